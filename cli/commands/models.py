"""`optplan models`: the models known by name."""

from __future__ import annotations

from optplan import options, output


def models(text: options.Filter = None, json: options.Json = False) -> None:
    """List the models known by name.

    Each with its exact parameter count; sources and dates with --json.
    """
    from optplan.planner.listings import list_models

    listing = list_models(text)
    if json:
        output.print_json(listing)
    else:
        from optplan.reports.terminal.listings import render_models

        output.print_terminal(render_models, listing)
