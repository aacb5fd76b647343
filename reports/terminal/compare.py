"""`optplan compare` for the terminal: records of a step side by side."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from optplan.planner.errors import printable
from optplan.planner.measured.comparison import ComparedRow, Comparison, EventDifference, Section
from optplan.planner.units import format_bytes
from optplan.reports.terminal.bars import LABELS
from optplan.reports.terminal.console import Glyphs, glyphs_of

_SECTIONS: dict[Section, str] = {
    "resident": "Resident, unrounded",
    "state": "Optimizer state by name, unrounded",
    "phases": "Peak allocated by phase",
    "peak": "Allocated at the peak by category",
    "totals": "Per GPU",
    "time": "Time",
}
_NAMES: dict[str, str] = {
    **{str(category): label for category, (label, _) in LABELS.items()},
    "peak_allocated_bytes": "peak allocated",
    "peak_reserved_bytes": "peak reserved",
    "device_bytes": "device, context included",
    "tokens_per_second": "tokens per second",
    "optimizer_copy_fraction": "optimizer, share of copy bandwidth",
    "host_launches_per_second": "host, launches per second",
}


def render_comparison(record: Comparison, console: Console) -> None:
    """Print every number of every side, its difference from the reference in bytes and percent, and where they part."""
    glyphs = glyphs_of(console)
    _print_sides(record, console, glyphs)
    for section, title in _SECTIONS.items():
        rows = [row for row in record.rows if row.section == section]
        if rows:
            console.print()
            console.print(_table(record, rows, title, glyphs))
    _print_events(record, console, glyphs)
    _print_tensors(record, console, glyphs)
    for note in record.notes:
        console.print(f"{glyphs.bullet} {printable(note)}", style="yellow")


def _print_sides(record: Comparison, console: Console, glyphs: Glyphs) -> None:
    for index, side in enumerate(record.sides):
        details = f" {glyphs.dot} ".join(f"{name} {value}" for name, value in side.details.items() if value)
        role = ", the reference" if index == record.reference else ""
        console.print(Text(f"{printable(side.label)}: {side.source}{role}", "bold"))
        console.print(Text(f"  {printable(details)}", "dim"))


def _table(record: Comparison, rows: list[ComparedRow], title: str, glyphs: Glyphs) -> Table:
    table = Table(box=glyphs.box, pad_edge=False, show_edge=False, header_style="bold")
    table.add_column(title, overflow="fold")
    table.add_column(printable(record.sides[record.reference].label), justify="right", overflow="fold")
    others = [index for index in range(len(record.sides)) if index != record.reference]
    for index in others:
        table.add_column(printable(record.sides[index].label), justify="right", overflow="fold")
        table.add_column("difference", justify="right", overflow="fold")
    for row in rows:
        cells = [_value(row, record.reference)]
        for index in others:
            cells += [_value(row, index), _difference(row, index, record.reference)]
        table.add_row(_NAMES.get(row.name, row.name), *cells)
    return table


def _value(row: ComparedRow, side: int) -> str:
    value = row.values[side]
    return "-" if value is None else _show(row.unit, value)


def _show(unit: str, value: int | float) -> str:
    if unit == "bytes":
        return format_bytes(int(value))
    if unit == "seconds":
        return f"{value * 1000:,.2f} ms"
    return f"{value:.1%}" if unit == "share" else f"{value:,.0f}"


def _difference(row: ComparedRow, side: int, reference: int) -> str:
    difference = row.differences[side]
    if difference is None:
        return ""
    if difference == 0:
        return "equal"
    fraction = row.fraction(side, reference)
    percent = f" {fraction:+.2%}" if fraction is not None else ""
    if row.unit == "bytes":
        return f"{int(difference):+,} B{percent}"
    return percent.strip()


def _print_events(record: Comparison, console: Console, glyphs: Glyphs) -> None:
    for difference in record.events:
        console.print()
        console.print(_event_text(record, difference))
        for index, found in ((record.reference, difference.reference), (difference.side, difference.found)):
            label = printable(record.sides[index].label)
            console.print(f"{glyphs.bullet} {label}: {printable(found or 'has ended')}")


def _event_text(record: Comparison, difference: EventDifference) -> Text:
    label = printable(record.sides[difference.side].label)
    return Text(f"{label} differs from event {difference.event:,} on; {difference.same_events:,} are equal", "bold")


def _print_tensors(record: Comparison, console: Console, glyphs: Glyphs) -> None:
    if not record.tensors:
        return
    console.print()
    table = Table(box=glyphs.box, pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("Largest differences by module at the peak", overflow="fold")
    table.add_column("Category", no_wrap=True)
    for side in record.sides:
        table.add_column(printable(side.label), justify="right", overflow="fold")
    for tensor in record.tensors:
        values = ["-" if value is None else format_bytes(value) for value in tensor.values]
        table.add_row(printable(tensor.name), LABELS[tensor.category][0], *values)
    console.print(table)
