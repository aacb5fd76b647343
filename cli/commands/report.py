"""`optplan report`: records as one self-contained page."""

from __future__ import annotations

from typing import Annotated

import typer

from optplan import options, output


def report(
    records: Annotated[
        list[str],
        typer.Argument(metavar="RECORD...", help="Files that --json, --out or profile have written, or training runs."),
    ],
    html: Annotated[str, typer.Option("--html", metavar="FILE", help="The page to write.")] = "optplan-report.html",
    md: options.Markdown = None,
) -> None:
    """Write one self-contained HTML page of records.

    An estimate becomes the page of its recommendation, a measured or traced step is laid over what the rules say of it,
    several records are compared, and a .jsonl file of training runs shows their curves. The page opens offline and
    asks for nothing from anywhere.
    """
    from optplan.reports.html.documents import files_page

    output.check_targets(html, md)
    page = files_page(records)
    output.write_page(html, lambda: page)
    output.write_page(md, lambda: _markdown(records))


def _markdown(records: list[str]) -> str:
    from optplan.reports.markdown.documents import files_markdown

    return files_markdown(records)
