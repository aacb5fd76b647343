"""A validation as Markdown: the verdict on the state, the spread of each error, every record."""

from __future__ import annotations

from optplan.planner.measured.validation import Judgement, ValidationReport
from optplan.planner.units import format_bytes
from optplan.reports.labels import ERROR_NAMES
from optplan.reports.markdown.tables import escaped, table


def validation_markdown(report: ValidationReport) -> str:
    """The whole answer; ends with a line break."""
    titles = ["Error against measured", "Records", "Median", "Worst", "in"]
    spreads = [
        [ERROR_NAMES.get(spread.metric, f"peak allocated in {spread.metric.removesuffix('_error')}"), str(spread.count),
         f"{spread.median:.3%}", f"{spread.worst:.3%}", escaped(spread.worst_record)]
        for spread in report.spreads
    ]  # fmt: skip
    lines = [f"### {_headline(report)}", "", *table(titles, spreads), ""]
    traced = any(row.trace_peak_error is not None for row in report.judgements)
    columns = ["Record", "State", "Peak", "Reserved", "Step time", *(["Peak by trace"] if traced else [])]
    lines += [*table(columns, [_row(row, traced=traced) for row in report.judgements]), ""]
    lines += [f"- {escaped(name)}: {escaped(reason)}" for name, reason in report.skipped.items()]
    return "\n".join([*lines, f"- optplan {report.version}"]) + "\n"


def _headline(report: ValidationReport) -> str:
    if not report.state_known:
        return "No record tells the bytes of its optimizer's state"
    return f"Optimizer state predicted to the byte in {report.state_exact} of {report.state_known} records"


def _row(row: Judgement, *, traced: bool) -> list[str]:
    state = row.state_difference_bytes
    told = "-" if state is None else "exact" if state == 0 else f"{'+' if state > 0 else '-'}{format_bytes(abs(state))}"
    errors = [row.peak_error, row.reserved_error, row.step_seconds_error, *([row.trace_peak_error] if traced else [])]
    cells = ["-" if error is None else f"{error:+.3%}" for error in errors]
    if row.out_of_memory:
        cells = ["out of memory", *["-"] * (len(errors) - 1)]
    return [escaped(row.record), told, *cells]
