"""A comparison as Markdown: every number of every record with its difference from the reference."""

from __future__ import annotations

from collections.abc import Sequence

from optplan.planner.measured.comparison import ComparedRow, Comparison
from optplan.planner.units import format_bytes
from optplan.reports.labels import ROW_NAMES, SECTION_TITLES
from optplan.reports.markdown.tables import escaped, table


def comparison_markdown(record: Comparison) -> str:
    """The whole comparison; ends with a line break."""
    lines: list[str] = []
    for side in record.sides:
        details = ", ".join(f"{name} {value}" for name, value in side.details.items() if value)
        lines.append(f"- **{escaped(side.label)}**: {side.source}; {escaped(details)}")
    for section, title in SECTION_TITLES.items():
        rows = [row for row in record.rows if row.section == section]
        if rows:
            lines += ["", f"### {title}", "", *_table(record, rows)]
    lines += ["", *(f"- {escaped(note)}" for note in record.notes)] if record.notes else []
    return "\n".join(lines) + "\n"


def _table(record: Comparison, rows: Sequence[ComparedRow]) -> list[str]:
    others = [index for index in range(len(record.sides)) if index != record.reference]
    titles = ["", escaped(record.sides[record.reference].label)]
    for index in others:
        titles += [escaped(record.sides[index].label), "difference"]
    lines = []
    for row in rows:
        cells = [escaped(ROW_NAMES.get(row.name, row.name)), _value(row, record.reference)]
        for index in others:
            cells += [_value(row, index), _difference(row, index, record.reference)]
        lines.append(cells)
    return table(titles, lines)


def _value(row: ComparedRow, side: int) -> str:
    value = row.values[side]
    if value is None:
        return "-"
    if row.unit == "bytes":
        return format_bytes(int(value))
    if row.unit == "seconds":
        return f"{value * 1000:,.2f} ms"
    return f"{value:.1%}" if row.unit == "share" else f"{value:,.0f}"


def _difference(row: ComparedRow, side: int, reference: int) -> str:
    difference = row.differences[side]
    if difference is None:
        return ""
    if difference == 0:
        return "equal"
    fraction = row.fraction(side, reference)
    percent = f" {fraction:+.2%}" if fraction is not None else ""
    return f"{int(difference):+,} B{percent}" if row.unit == "bytes" else percent.strip()
