"""`optplan replay` for the terminal: how far the simulation is the recording, and what else could have been."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from optplan.planner.errors import printable
from optplan.planner.history.report import Agreement, HistoryReport, Outcome
from optplan.planner.units import format_bytes
from optplan.reports.terminal.console import Glyphs, glyphs_of

_ROWS = (
    ("peak allocated", "peak_allocated_bytes"),
    ("peak active", "peak_active_bytes"),
    ("peak requested", "peak_requested_bytes"),
    ("peak reserved", "peak_reserved_bytes"),
)
_FINAL_ROWS = (
    ("allocated at the end", "allocated_bytes"),
    ("reserved at the end", "reserved_bytes"),
    ("cached in segments in use", "inactive_split_bytes"),
)


def render_replay(report: HistoryReport, console: Console) -> None:
    """Print the agreement, the peaks and the verdict."""
    glyphs, facts = glyphs_of(console), report.history
    console.print(Text(f"{printable(facts.source)}, device {facts.device}", "bold"))
    streams = "1 stream" if facts.num_streams == 1 else f"{facts.num_streams} streams"
    settings = "torch's own settings" if not facts.alloc_conf else printable(facts.alloc_conf)
    console.print(
        f"{facts.num_events:,} events, {facts.num_allocations:,} allocations on {streams}; recorded under {settings}"
    )
    console.print()
    _print_agreement(report.agreement, console)
    console.print()
    console.print(_table(report, glyphs))
    if report.what_if is not None:
        _print_verdict(report.what_if, console)
    for note in report.notes:
        console.print(f"{glyphs.bullet} {note}", style="dim")


def _print_agreement(agreement: Agreement, console: Console) -> None:
    if agreement.is_whole:
        console.print(
            Text(
                f"The replay is the recording: all {agreement.num_allocations:,} addresses and all"
                f" {agreement.num_moves:,} moves of memory are equal.",
                "green",
            )
        )
        return
    console.print(
        Text(
            f"The replay leaves the recording: {agreement.num_equal_addresses:,} of {agreement.num_allocations:,}"
            f" addresses and {agreement.num_equal_moves:,} of {agreement.num_moves:,} moves of memory are equal.",
            "yellow",
        )
    )
    if agreement.first_difference is not None:
        console.print(f"First difference: {agreement.first_difference}.")
    for row in agreement.comparisons:
        if row.recorded != row.replayed:
            console.print(f"{row.name}: recorded {row.recorded:,}, replayed {row.replayed:,}")


def _table(report: HistoryReport, glyphs: Glyphs) -> Table:
    table = Table(box=glyphs.box, pad_edge=False)
    table.add_column("")
    table.add_column("As recorded", justify="right")
    outcomes = [report.replay]
    if report.what_if is not None:
        outcomes.append(report.what_if)
        table.add_column("What if", justify="right")
        table.add_column("Difference", justify="right")
        table.add_row("settings", *(printable(outcome.alloc_conf) or "torch's own" for outcome in outcomes), "")
        limits = [outcome.memory_bytes for outcome in outcomes]
        table.add_row("memory", *("as recorded" if limit is None else format_bytes(limit) for limit in limits), "")
    for label, name in _ROWS:
        table.add_row(label, *_cells([getattr(outcome, name) for outcome in outcomes]))
    for label, name in _FINAL_ROWS:
        table.add_row(label, *_cells([getattr(outcome.final, name) for outcome in outcomes]))
    table.add_row("retries on a full device", *(f"{outcome.num_alloc_retries:,}" for outcome in outcomes))
    return table


def _cells(values: list[int]) -> list[str]:
    cells = [format_bytes(value) for value in values]
    if len(values) == 1:
        return cells
    difference = values[1] - values[0]
    return [*cells, "0 B" if difference == 0 else f"{'+' if difference > 0 else '-'}{format_bytes(abs(difference))}"]


def _print_verdict(outcome: Outcome, console: Console) -> None:
    failure = outcome.out_of_memory
    if failure is None:
        if outcome.memory_bytes is not None:
            console.print(Text(f"Everything is served within {format_bytes(outcome.memory_bytes)}.", "green"))
        return
    when = "placing what the recording begins with" if failure.event < 0 else f"event {failure.event:,}"
    console.print(
        Text(
            f"Out of memory at {when}, after {failure.allocation:,} allocations:"
            f" {format_bytes(failure.requested_bytes)} asked for with {format_bytes(failure.allocated_bytes)} allocated"
            f" and {format_bytes(failure.reserved_bytes)} reserved.",
            "bold red",
        )
    )
