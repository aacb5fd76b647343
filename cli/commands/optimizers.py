"""`optplan optimizers`: the optimizers modelled."""

from __future__ import annotations

from optplan import options, output


def optimizers(text: options.Filter = None, json: options.Json = False) -> None:
    """List the optimizers modelled.

    Each with its implementations, its options and what is known of it.
    """
    from optplan.planner.listings import list_optimizers

    listing = list_optimizers(text)
    if json:
        output.print_json(listing)
    else:
        from optplan.reports.terminal.listings import render_optimizers

        output.print_terminal(render_optimizers, listing)
