"""`optplan explain` for the terminal: one configuration part by part."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from optplan.planner.explanation import ExplainedPart, Explanation
from optplan.planner.units import format_bytes
from optplan.reports.terminal.console import Glyphs, glyphs_of


def render_explanation(record: Explanation, console: Console) -> None:
    """Print every part with its lines, formulas and source."""
    glyphs = glyphs_of(console)
    options = ", ".join(f"{key}={_text(value)}" for key, value in record.options.items())
    console.print(
        Text(
            f"{record.model.name} on {record.gpu.name} with {record.optimizer} ({record.implementation}"
            f"{', ' + options if options else ''})",
            "bold",
        )
    )
    for part in record.parts:
        _print_part(part, console, glyphs)
    if record.notes:
        console.print()
    for note in record.notes:
        console.print(f"{glyphs.bullet} {note}", style="dim")


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _print_part(part: ExplainedPart, console: Console, glyphs: Glyphs) -> None:
    console.print()
    console.print(Text.assemble((part.title, "bold"), f"  {part.bytes:,} B = {format_bytes(part.bytes)}"))
    if part.lines:
        console.print(_lines(part, glyphs))
    if part.remark:
        console.print(part.remark)
    console.print(f"source: {part.source}", style="dim")


def _lines(part: ExplainedPart, glyphs: Glyphs) -> Table:
    table = Table.grid(padding=(0, 2), pad_edge=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for line in part.lines:
        times = f"{line.count} {glyphs.times} " if line.count > 1 else ""
        table.add_row(f"  {line.name}", f"{line.bytes:,} B", f"{times}{line.formula}")
    return table
