"""`optplan published`: the papers' memory figures beside ours."""

from __future__ import annotations

import typer

from optplan import options, output


def published(json: options.Json = False) -> None:
    """Hold the papers' memory figures against ours.

    The exit status is 1 if a figure that should hold does not.
    """
    from optplan.planner.published import published_report

    report = published_report()
    if json:
        output.print_json(report)
    else:
        from optplan.reports.terminal.published import render_published

        output.print_terminal(render_published, report)
    if report.counts["fails"]:
        raise typer.Exit(1)
