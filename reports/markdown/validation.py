"""A validation as Markdown: the verdict on the state, the spread of each error, every record."""

from __future__ import annotations

from collections.abc import Sequence

from optplan.planner.measured.validation import Judgement, ValidationReport
from optplan.planner.units import format_bytes
from optplan.reports.labels import ERROR_NAMES
from optplan.reports.markdown.tables import escaped, table
from optplan.reports.validated_times import has_several_processes, how_timed


def validation_markdown(report: ValidationReport) -> str:
    """The whole answer; ends with a line break."""
    titles = ["Error against measured", "Records", "Median", "Worst", "in"]
    spreads = [
        [ERROR_NAMES.get(spread.metric, f"peak allocated in {spread.metric.removesuffix('_error')}"), str(spread.count),
         f"{spread.median:.3%}", f"{spread.worst:.3%}", escaped(spread.worst_record)]
        for spread in report.spreads
    ]  # fmt: skip
    timed = how_timed(report.judgements)
    lines = [f"### {_headline(report)}", "", *table(titles, spreads), "", *([timed, ""] if timed else [])]
    lines += [*_records(report.judgements), ""]
    lines += [f"- {escaped(name)}: {escaped(reason)}" for name, reason in report.skipped.items()]
    return "\n".join([*lines, f"- optplan {report.version}"]) + "\n"


def _records(rows: Sequence[Judgement]) -> list[str]:
    traced, several = any(row.trace_peak_error is not None for row in rows), has_several_processes(rows)
    columns = ["Record", "State", "Peak", "Reserved", "Step time"]
    columns += [*(["over processes"] if several else []), *(["Peak by trace"] if traced else [])]
    return table(columns, [_row(row, traced=traced, several=several) for row in rows])


def _headline(report: ValidationReport) -> str:
    if not report.state_known:
        return "No record tells the bytes of its optimizer's state"
    return f"Optimizer state predicted to the byte in {report.state_exact} of {report.state_known} records"


def _row(row: Judgement, *, traced: bool, several: bool) -> list[str]:
    state = row.state_difference_bytes
    told = "-" if state is None else "exact" if state == 0 else f"{'+' if state > 0 else '-'}{format_bytes(abs(state))}"
    cells = [_percent(error) for error in (row.peak_error, row.reserved_error, row.step_seconds_error)]
    cells += [str(row.num_processes or "-")] if several else []
    cells += [_percent(row.trace_peak_error)] if traced else []
    if row.out_of_memory:
        cells = ["out of memory", *["-"] * (len(cells) - 1)]
    return [escaped(row.record), told, *cells]


def _percent(error: float | None) -> str:
    return "-" if error is None else f"{error:+.3%}"
