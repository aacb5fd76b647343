"""`optplan compare`: estimates, traces and measurements of a step beside each other."""

from __future__ import annotations

from typing import Annotated

import typer

from optplan import options, output


def compare(
    records: Annotated[
        list[str], typer.Argument(metavar="RECORD...", help="Files that --json, --out or profile have written.")
    ],
    json: options.Json = False,
) -> None:
    """Lay records of a training step side by side.

    Prints every number with its difference in bytes and percent from the measurement among them, or else from the first
    record; the first event at which two timelines part; and the largest differences by name at the peak.
    """
    from optplan.planner.comparison import compare as compare_sides
    from optplan.planner.comparison_sides import sides_of

    comparison = compare_sides(sides_of(list(records)))
    if json:
        output.print_json(comparison)
    else:
        from optplan.reports.terminal.compare import render_comparison

        output.print_terminal(render_comparison, comparison)
