"""`optplan gpus`: the GPUs known by name."""

from __future__ import annotations

from optplan import options, output


def gpus(text: options.Filter = None, json: options.Json = False) -> None:
    """List the GPUs known by name.

    What the driver reports, what torch can use, bandwidth and arithmetic; sources and dates with --json.
    """
    from optplan.planner.listings import list_gpus

    listing = list_gpus(text)
    if json:
        output.print_json(listing)
    else:
        from optplan.reports.terminal.listings import render_gpus

        output.print_terminal(render_gpus, listing)
