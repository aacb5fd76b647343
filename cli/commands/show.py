"""`optplan show`: a saved record, a measurement beside what today's rules say of the same step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from optplan import options, output

if TYPE_CHECKING:
    from optplan.planner.measured.record_files import Record


def show(
    record: Annotated[str, typer.Argument(metavar="RECORD", help="File that --json, --out or profile have written.")],
    html: options.Html = None,
    md: options.Markdown = None,
    json: options.Json = False,
) -> None:
    """Show a saved record.

    An estimate as it was printed; a measured or traced step beside today's estimate of it, with the differences.
    """
    from optplan.planner.measured.measurement import Measurement
    from optplan.planner.measured.record_files import load_record

    output.check_targets(html, md)
    loaded = load_record(record)
    if json:
        output.print_json(loaded)
    elif isinstance(loaded, Measurement):
        from optplan.reports.terminal.measurement import render_measurement

        output.print_terminal(render_measurement, loaded)
    else:
        from optplan.reports.terminal.estimate import render_estimate

        output.print_terminal(render_estimate, loaded)
    output.write_page(html, lambda: _page(loaded))
    output.write_page(md, lambda: _markdown(loaded))


def _page(record: Record) -> str:
    from optplan.reports.html.documents import record_page

    return record_page(record)


def _markdown(record: Record) -> str:
    from optplan.reports.markdown.documents import record_markdown

    return record_markdown(record)
