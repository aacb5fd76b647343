"""`optplan show`: a saved record, a measurement beside what today's rules say of the same step."""

from __future__ import annotations

from typing import Annotated

import typer

from optplan import options, output


def show(
    record: Annotated[str, typer.Argument(metavar="RECORD", help="File that --json, --out or profile have written.")],
    json: options.Json = False,
) -> None:
    """Show a saved record.

    An estimate as it was printed; a measured or traced step beside today's estimate of it, with the differences.
    """
    from optplan.planner.measurement import Measurement
    from optplan.planner.record_files import load_record

    loaded = load_record(record)
    if json:
        output.print_json(loaded)
    elif isinstance(loaded, Measurement):
        from optplan.reports.terminal.measurement import render_measurement

        output.print_terminal(render_measurement, loaded)
    else:
        from optplan.reports.terminal.estimate import render_estimate

        output.print_terminal(render_estimate, loaded)
