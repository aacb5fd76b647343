"""`optplan profile` and `optplan show` for the terminal: a measured step beside what the rules predict."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from optplan.planner.errors import ConfigError, printable
from optplan.planner.measured.comparison import tabulate
from optplan.planner.measured.expectation import hold_against_rules
from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.sides import side_of_measurement
from optplan.planner.units import format_bytes, format_gib
from optplan.reports.terminal.compare import render_comparison
from optplan.reports.terminal.console import Glyphs, glyphs_of


def render_measurement(record: Measurement, console: Console) -> None:
    """Print the verdict, every figure beside today's estimate, and the losses."""
    glyphs = glyphs_of(console)
    console.print(_headline(record))
    console.print(_setting(record, glyphs), style="dim")
    if record.out_of_memory is not None and record.out_of_memory.message:
        console.print(Text(printable(record.out_of_memory.message), "red"))
    console.print()
    try:
        comparison = hold_against_rules(record)
    except ConfigError as error:
        comparison = tabulate([side_of_measurement(record, label="measured")])
        console.print(f"{glyphs.bullet} no estimate to hold it against: {error}", style="yellow")
    render_comparison(comparison, console)
    if record.ranks:
        console.print()
        console.print(_ranks(record, glyphs))
    if record.losses:
        shown = ", ".join(f"{loss:.4f}" for loss in record.losses[:8])
        console.print(f"Losses: {shown}{' ...' if len(record.losses) > 8 else ''}")


def _headline(record: Measurement) -> Text:
    name = f"{printable(record.model.name)} with {record.optimizer} ({record.implementation})"
    failure = record.out_of_memory
    if failure is not None:
        asked = f", asking for {format_bytes(failure.requested_bytes)}" if failure.requested_bytes else ""
        return Text(
            f"{name} ran out of memory in {failure.phase}{asked}, with {format_gib(failure.allocated_bytes)} allocated",
            "bold red",
        )
    if record.peak_allocated_bytes is None:
        return Text(f"{name} ran on the CPU: tensors are counted, there is no allocator to read", "bold")
    return Text(
        f"{name}: peak {format_gib(record.peak_allocated_bytes)} allocated, in {record.peak_phase}", "bold green"
    )


def _ranks(record: Measurement, glyphs: Glyphs) -> Table:
    """Every rank's own figures."""
    table = Table(box=glyphs.box, pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("Rank", no_wrap=True)
    for title in ("State", "Peak allocated", "Peak reserved", "Step"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in record.ranks:
        peak = "out of memory" if row.out_of_memory else _gib(row.peak_allocated_bytes)
        seconds = "-" if row.step_seconds is None else f"{row.step_seconds * 1000:,.2f} ms"
        table.add_row(
            str(row.rank), format_bytes(row.bytes.optimizer_state), peak, _gib(row.peak_reserved_bytes), seconds
        )
    return table


def _gib(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else format_gib(num_bytes)


def _setting(record: Measurement, glyphs: Glyphs) -> str:
    config, environment = record.config, record.environment
    parts = [
        environment.gpu or "CPU",
        config.precision,
        f"micro-batch {config.batch_size} {glyphs.times} {config.seq_len} tokens",
        f"checkpointing {config.checkpointing}",
        f"{config.attention} attention",
    ]
    if environment.other_processes_bytes:
        parts.append(f"{format_gib(environment.other_processes_bytes)} held by others on this GPU before")
    if record.device_bytes is not None:
        basis = {"process": "the driver's figure for this process", "difference": "less what others held before"}
        parts.append(f"device bytes: {basis[record.device_basis or 'process']}")
    return f" {glyphs.dot} ".join(parts)
