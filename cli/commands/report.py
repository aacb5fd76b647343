"""`optplan report`: records as one self-contained page."""

from __future__ import annotations

from typing import Annotated

import typer

from optplan import output


def report(
    records: Annotated[
        list[str],
        typer.Argument(metavar="RECORD...", help="Files that --json, --out or profile have written, or training runs."),
    ],
    html: Annotated[str, typer.Option("--html", metavar="FILE", help="The page to write.")] = "optplan-report.html",
) -> None:
    """Write one self-contained HTML page of records.

    An estimate becomes the page of its recommendation, a measured or traced step is laid over what the rules say of it,
    several records are compared, and a .jsonl file of training runs shows their curves. The page opens offline and
    asks for nothing from anywhere.
    """
    from optplan.reports.html.documents import files_page

    output.check_targets(html)
    page = files_page(records)
    output.write_page(html, lambda: page)
