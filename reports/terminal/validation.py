"""`optplan validate` for the terminal: how far the estimates are from what was measured."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from optplan.planner.errors import printable
from optplan.planner.measured.validation import Judgement, Spread, ValidationReport
from optplan.planner.units import format_bytes, format_gib
from optplan.reports.labels import ERROR_NAMES
from optplan.reports.terminal.console import Glyphs, glyphs_of
from optplan.reports.validated_times import has_several_processes, how_timed


def render_validation(report: ValidationReport, console: Console) -> None:
    """Print the verdict on the state, the spread of each error, and every record."""
    glyphs = glyphs_of(console)
    console.print(_headline(report))
    console.print()
    console.print(_spreads(report.spreads, glyphs))
    timed = how_timed(report.judgements)
    if timed:
        console.print(Text(timed, "dim"))
    console.print()
    console.print(_records(report.judgements, console.width, glyphs))
    for name, reason in report.skipped.items():
        console.print(f"{glyphs.bullet} {printable(name)}: {printable(reason)}", style="yellow")


def _headline(report: ValidationReport) -> Text:
    count, exact = report.state_known, report.state_exact
    if not count:
        return Text("No record tells the bytes of its optimizer's state", "bold yellow")
    style = "bold green" if exact == count else "bold red"
    return Text(f"Optimizer state predicted to the byte in {exact} of {count} records", style)


def _spreads(spreads: list[Spread], glyphs: Glyphs) -> Table:
    table = Table(box=glyphs.box, pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("Error against measured", overflow="fold")
    table.add_column("Records", justify="right", no_wrap=True)
    table.add_column("Median", justify="right", no_wrap=True)
    table.add_column("Worst", justify="right", no_wrap=True)
    table.add_column("in", overflow="fold")
    for spread in spreads:
        name = ERROR_NAMES.get(spread.metric, f"peak allocated in {spread.metric.removesuffix('_error')}")
        table.add_row(
            name, str(spread.count), f"{spread.median:.3%}", f"{spread.worst:.3%}", printable(spread.worst_record)
        )
    return table


def _records(rows: list[Judgement], width: int, glyphs: Glyphs) -> Table:
    table = Table(box=glyphs.box, pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("Record", overflow="fold")
    table.add_column("State", justify="right", no_wrap=True)
    table.add_column("Peak\nmeasured", justify="right", no_wrap=True)
    table.add_column("Peak\nerror", justify="right", no_wrap=True)
    traced = any(row.trace_peak_error is not None for row in rows)
    if traced:
        table.add_column("by\ntrace", justify="right", no_wrap=True)
    wide = width >= 100
    several = wide and has_several_processes(rows)
    if wide:
        table.add_column("Reserved\nerror", justify="right", no_wrap=True)
        table.add_column("Step time\nerror", justify="right", no_wrap=True)
    if several:
        table.add_column("over\nprocesses", justify="right", no_wrap=True)
    for row in rows:
        peak = "-" if row.peak_allocated_bytes is None else format_gib(row.peak_allocated_bytes)
        cells = [printable(row.record), _state(row), peak, _verdict(row)]
        cells += [_percent(row.trace_peak_error)] if traced else []
        if wide:
            cells += [_percent(row.reserved_error), _percent(row.step_seconds_error)]
        cells += [str(row.num_processes or "-")] if several else []
        table.add_row(*cells)
    return table


def _state(row: Judgement) -> str:
    if row.state_difference_bytes is None:
        return "-"
    return "exact" if row.state_difference_bytes == 0 else f"off by {format_bytes(row.state_difference_bytes)}"


def _verdict(row: Judgement) -> str:
    if row.out_of_memory:
        return "out of memory, " + ("as predicted" if row.verdict_right else "predicted to fit")
    return _percent(row.peak_error)


def _percent(error: float | None) -> str:
    return "-" if error is None else f"{error:+.3%}"
