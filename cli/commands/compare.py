"""`optplan compare`: estimates, traces and measurements of a step beside each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from optplan import options, output

if TYPE_CHECKING:
    from optplan.planner.measured.comparison import Comparison
    from optplan.planner.measured.sides import Side


def compare(
    records: Annotated[
        list[str], typer.Argument(metavar="RECORD...", help="Files that --json, --out or profile have written.")
    ],
    html: options.Html = None,
    md: options.Markdown = None,
    json: options.Json = False,
) -> None:
    """Lay records of a training step side by side.

    Prints every number with its difference in bytes and percent from the measurement among them, or else from the first
    record; the first event at which two timelines part; and the largest differences by name at the peak.
    """
    from optplan.planner.measured.comparison import compare as compare_sides
    from optplan.planner.measured.sides import sides_of

    output.check_targets(html, md)
    sides = sides_of(list(records))
    comparison = compare_sides(sides)
    if json:
        output.print_json(comparison)
    else:
        from optplan.reports.terminal.compare import render_comparison

        output.print_terminal(render_comparison, comparison)
    output.write_page(html, lambda: _page(sides))
    output.write_page(md, lambda: _markdown(comparison))


def _page(sides: list[Side]) -> str:
    from optplan.reports.html.comparison_page import comparison_page

    return comparison_page(sides)


def _markdown(comparison: Comparison) -> str:
    from optplan.reports.markdown.comparison import comparison_markdown

    return comparison_markdown(comparison)
