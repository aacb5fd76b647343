"""Sections of a comparison: the errors, the timelines, where the bytes differ, times, environments."""

from __future__ import annotations

from collections.abc import Sequence

from optplan.planner.measured.comparison import ComparedRow, Comparison
from optplan.planner.measured.comparison import Section as Group
from optplan.planner.measured.sides import Side
from optplan.planner.units import format_bytes
from optplan.reports.html.figures.differences import compared_bars
from optplan.reports.html.figures.overlay import overlay
from optplan.reports.html.parts import Column, Drawing, Fact, Facts, Kind, Part, Points, Section, Table, Value
from optplan.reports.labels import CATEGORY_NAMES, ROW_NAMES, SECTION_TITLES

_KINDS: dict[str, Kind] = {"bytes": "bytes", "seconds": "milliseconds", "per second": "int", "share": "percent"}
_METRICS: dict[str, str] = {
    "peak_allocated_bytes": "allocated: what tensors hold, blocks of the allocator",
    "peak_reserved_bytes": "reserved: what the allocator holds from the driver, cached blocks included",
    "device_bytes": "device: reserved and the context, as the driver reports it",
}


def errors(record: Comparison) -> Section:
    """How far the records are apart in the totals."""
    rows = _rows(record, "totals")
    parts: list[Part] = [_facts(record)]
    if rows:
        table = _table(record, rows, id_="totals", caption="Totals per GPU", metrics=True)
        parts.append(table)
    if record.notes:
        parts.append(Points(record.notes))
    reference = record.sides[record.reference]
    lead = f"Differences are from “{reference.label}”: {_source_word(reference.source)}."
    return Section("apart", "How far apart?", lead, parts)


def timelines(record: Comparison, sides: Sequence[Side]) -> Section | None:
    """The timelines over each other, and the first event at which they part; None where no record holds events."""
    drawn = [side for side in sides if side.history is not None]
    if not drawn:
        return None
    table = Table(
        id="timelines-data",
        caption="Peaks of the timelines",
        columns=[Column("Record"), Column("Source"), Column("Events", "int"), Column("Peak after event", "int"),
                 Column("Peak allocated", "bytes")],
        rows=[[side.label, side.source, len(side.history.events), side.history.peak_event,
               max(side.history.allocated)] for side in drawn if side.history],
        source="events of the records; the rules' are replayed through the simulated allocator",
    )  # fmt: skip
    drawing = Drawing(
        id="timelines",
        title="Allocated memory over the step",
        summary="Events in their order; a measured step is drawn solid, predictions dashed.",
        figure=overlay(sides),
        table=table,
    )
    return Section("timelines", "Where do they part?", "", [drawing, *_partings(record)])


def _partings(record: Comparison) -> list[Part]:
    sentences = []
    for found in record.events:
        label, reference = record.sides[found.side].label, record.sides[record.reference].label
        sentences.append(
            f"{label} differs from event {found.event:,} on; {found.same_events:,} are equal before it."
            f" {reference}: {found.reference or 'has ended'}. {label}: {found.found or 'has ended'}."
        )
    return [Points(sentences)] if sentences else []


def bytes_apart(record: Comparison) -> Section:
    """Differences by phase, category, state and name."""
    parts: list[Part] = []
    groups: tuple[Group, ...] = ("peak", "phases")
    for group in groups:
        rows = _rows(record, group)
        if rows:
            parts.append(_drawing(record, rows, group))
    groups = ("resident", "state")
    for group in groups:
        rows = _rows(record, group)
        if rows:
            parts.append(_table(record, rows, id_=group, caption=SECTION_TITLES[group]))
    if record.tensors:
        parts.append(_names(record))
    return Section("bytes", "Which bytes differ?", "By category and phase, by state, and by name at the peak.", parts)


def times(record: Comparison) -> Section | None:
    """Step times, None where no record has any."""
    rows = _rows(record, "time")
    sound = [row for row in rows if all(value is None or value >= 0 for value in row.values)]
    if not rows:
        return None
    parts: list[Part] = []
    if sound:
        caption = "Times of a step, medians: milliseconds unless the row says else"
        parts.append(_table(record, sound, id_="step-times", caption=caption))
    if len(sound) < len(rows):
        names = ", ".join(ROW_NAMES.get(row.name, row.name) for row in rows if row not in sound)
        parts.append(Points([f"Left out, because the record holds negative values, which are no times: {names}."]))
    return Section("times", "How long does it take?", "", parts)


def environments(record: Comparison) -> Section:
    """What each record is of and where it was made."""
    names = list(dict.fromkeys(name for side in record.sides for name in side.details))
    rows: list[list[Value]] = [["source", *(_source_word(side.source) for side in record.sides)]]
    rows += [[name, *(side.details.get(name) or None for side in record.sides)] for name in names]
    table = Table(
        id="environment",
        caption="Environment of each record",
        columns=[Column("What"), *(Column(side.label) for side in record.sides)],
        rows=rows,
        source="the records themselves",
    )
    text = "A measurement says where it was made; a prediction says which version made it."
    return Section("records", "What was compared?", text, [table])


def _facts(record: Comparison) -> Facts:
    facts = []
    for row in _rows(record, "totals"):
        for index, side in enumerate(record.sides):
            fraction = row.fraction(index, record.reference)
            if index != record.reference and fraction is not None:
                facts.append(
                    Fact(f"{ROW_NAMES[row.name]}, {side.label}", fraction, "of the reference", "signed_percent")
                )
    return Facts(facts)


def _rows(record: Comparison, group: Group) -> list[ComparedRow]:
    """The rows of one group, categories in the order of all figures."""
    rows = [row for row in record.rows if row.section == group]
    order: list[str] = list(CATEGORY_NAMES)
    return sorted(rows, key=lambda row: order.index(row.name) if group == "peak" and row.name in order else -1)


def _drawing(record: Comparison, rows: Sequence[ComparedRow], group: Group) -> Drawing:
    return Drawing(
        id=f"by-{group}",
        title=SECTION_TITLES[group],
        summary=_largest(rows),
        figure=compared_bars(record, rows),
        table=_table(record, rows, id_=f"by-{group}-data", caption=SECTION_TITLES[group]),
    )


def _largest(rows: Sequence[ComparedRow]) -> str:
    found = max(rows, key=lambda row: max(abs(difference or 0) for difference in row.differences))
    size = max(abs(difference or 0) for difference in found.differences)
    name = ROW_NAMES.get(found.name, found.name)
    return f"The largest difference is {format_bytes(int(size))}, in {name}." if size else "All are equal."


def _table(record: Comparison, rows: Sequence[ComparedRow], *, id_: str, caption: str, metrics: bool = False) -> Table:
    kind = _KINDS[rows[0].unit]
    others = [index for index in range(len(record.sides)) if index != record.reference]
    columns = [Column("What"), Column(record.sides[record.reference].label, kind)]
    for index in others:
        label = record.sides[index].label
        columns += [Column(label, kind), Column(f"difference, {label}", _difference_kind(kind)),
                    Column(f"error, {label}", "signed_percent")]  # fmt: skip
    cells: list[list[Value]] = []
    for row in rows:
        line: list[Value] = [_METRICS.get(row.name, ROW_NAMES.get(row.name, row.name)) if metrics
                             else ROW_NAMES.get(row.name, row.name), _value(row, record.reference, kind)]  # fmt: skip
        for index in others:
            line += [_value(row, index, kind), row.differences[index], row.fraction(index, record.reference)]
        cells.append(line)
    return Table(id=id_, caption=caption, columns=columns, rows=cells, source=_sources(record))


def _value(row: ComparedRow, index: int, kind: Kind) -> Value:
    """A value of a row; rows of another unit than the column's say theirs."""
    value = row.values[index]
    if value is None or _KINDS[row.unit] == kind:
        return value
    return f"{value:.1%}" if row.unit == "share" else f"{value:,.0f} {row.unit}"


def _difference_kind(kind: Kind) -> Kind:
    return {"bytes": "signed_bytes"}.get(kind, kind)  # type: ignore[return-value]


def _names(record: Comparison) -> Table:
    return Table(
        id="by-name",
        caption="Largest differences by name, allocated at the peak",
        columns=[
            Column("Name", "code"),
            Column("Category"),
            *(Column(side.label, "bytes") for side in record.sides),
            Column("Largest difference", "signed_bytes"),
        ],
        rows=[
            [tensor.name, CATEGORY_NAMES[tensor.category], *tensor.values, _spread(tensor.values, record.reference)]
            for tensor in record.tensors
        ],
        source=_sources(record),
    )


def _spread(values: Sequence[int | None], reference: int) -> int:
    """The largest difference from the reference; what a record does not hold counts as nothing."""
    base = values[reference] or 0
    return max(((value or 0) - base for value in values), key=abs)


def _sources(record: Comparison) -> str:
    return "; ".join(f"{side.label}: {_source_word(side.source)}" for side in record.sides)


def _source_word(source: str) -> str:
    return {
        "live": "a step on a GPU, the allocator's own history",
        "trace": "the model run without contents, allocator simulated",
        "rules": "step rules, allocator simulated",
    }[source]
