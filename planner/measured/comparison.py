"""Estimates, traces and measurements of one step side by side: where they differ, and by how much."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeVar

import msgspec

from optplan.planner.errors import ConfigError
from optplan.planner.measured.sides import UNEXPLAINED, Side, Source
from optplan.planner.records import StepConfig
from optplan.planner.replay import LiveTensor
from optplan.planner.step_history import StepHistory
from optplan.planner.timeline import Allocation, Category, Event
from optplan.planner.version import VERSION

Section = Literal["resident", "state", "phases", "peak", "totals", "time"]
Unit = Literal["bytes", "seconds", "per second", "share"]
_Key = TypeVar("_Key", bound=str)

NUM_TENSORS = 20


class ComparedSide(msgspec.Struct, frozen=True):
    """One of the records compared.

    Attributes:
        label: What tells it from the others.
        source: `rules` and `trace` are predictions, `live` is a measurement.
        details: What it is of and where it was made, by name.
    """

    label: str
    source: Source
    details: dict[str, str]


class ComparedRow(msgspec.Struct, frozen=True):
    """One number of all sides.

    Attributes:
        section: Part of the comparison that it belongs to.
        name: What it is: a category, a phase, a state name, a metric.
        unit: What the values count.
        values: One a side, None where the side does not say.
        differences: Each less the reference's; None where one of the two is missing.
    """

    section: Section
    name: str
    unit: Unit
    values: list[int | float | None]
    differences: list[int | float | None]

    def fraction(self, side: int, reference: int) -> float | None:
        """The difference as a share of the reference's value, None where there is none or it is 0."""
        base, difference = self.values[reference], self.differences[side]
        return None if difference is None or not base else difference / base


class EventDifference(msgspec.Struct, frozen=True):
    """The first event at which a side leaves the reference's step; None where one of them has ended.

    Attributes:
        side: Index of the side.
        event: Number of the event, counted from 1.
        same_events: How many events are equal in all, in their order, before it.
        reference: The event of the reference in words.
        found: The side's event in words.
    """

    side: int
    event: int
    same_events: int
    reference: str | None
    found: str | None


class TensorDifference(msgspec.Struct, frozen=True):
    """Bytes at the peak that one module has, where the sides differ: one value a side, None without a history."""

    name: str
    category: Category
    values: list[int | None]


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Any number of records of training steps beside one of them.

    Attributes:
        reference: Index of the side that the others are held against: the first measurement, or else the first side.
        rows: The numbers, those that no side has left out.
        events: Where each side with a history first differs from the reference's; sides that do not differ are missing.
        tensors: Largest differences by name at the peak.
        notes: What a reader must know, such as that the sides are of different steps.
    """

    schema: Literal["optplan.compare/1"] = "optplan.compare/1"
    version: str
    sides: list[ComparedSide]
    reference: int
    rows: list[ComparedRow]
    events: list[EventDifference]
    tensors: list[TensorDifference]
    notes: list[str]


def compare(sides: Sequence[Side]) -> Comparison:
    """Lay records side by side.

    Raises:
        ConfigError: There are fewer than two.
    """
    if len(sides) < 2:
        raise ConfigError(f"a comparison needs at least two records, got {len(sides)}")
    return tabulate(sides)


def tabulate(sides: Sequence[Side]) -> Comparison:
    """The numbers of one or several records in one table."""
    reference = next((index for index, side in enumerate(sides) if side.source == "live"), 0)
    return Comparison(
        version=VERSION,
        sides=[ComparedSide(side.label, side.source, side.details) for side in sides],
        reference=reference,
        rows=[row for row in _rows(sides, reference) if any(value is not None for value in row.values)],
        events=_event_differences(sides, reference),
        tensors=_tensor_differences(sides),
        notes=_notes(sides, reference),
    )


def _rows(sides: Sequence[Side], reference: int) -> Iterable[ComparedRow]:
    def row(section: Section, name: str, unit: Unit, values: Sequence[int | float | None]) -> ComparedRow:
        base = values[reference]
        differences = [None if value is None or base is None else value - base for value in values]
        return ComparedRow(section, name, unit, list(values), differences)

    for name in ("parameters", "gradients", "master_weights", "optimizer_state"):
        yield row("resident", name, "bytes", [getattr(side.bytes, name) for side in sides])
    for name in _keys(side.state_tensors for side in sides):
        yield row("state", name, "bytes", [side.state_tensors.get(name, 0) for side in sides])
    for phase in _keys(side.phases for side in sides):
        yield row("phases", phase, "bytes", [side.phases.get(phase) for side in sides])
    for category in _keys(side.categories for side in sides):
        if category == UNEXPLAINED:
            continue
        yield row("peak", category, "bytes", [_category(side, category) for side in sides])
    yield row("peak", UNEXPLAINED, "bytes", [side.unexplained_bytes for side in sides])
    for name in ("peak_allocated_bytes", "peak_reserved_bytes", "device_bytes"):
        yield row("totals", name, "bytes", [getattr(side, name) for side in sides])
    yield row("time", "whole step", "seconds", [side.step_seconds for side in sides])
    for part in _keys(side.phase_seconds for side in sides):
        yield row("time", part, "seconds", [side.phase_seconds.get(part) for side in sides])
    yield row("time", "tokens_per_second", "per second", [side.tokens_per_second for side in sides])
    yield row("time", "optimizer_copy_fraction", "share", [side.optimizer_copy_fraction for side in sides])
    launching = [side.host_launch_seconds for side in sides]
    yield row(
        "time", "host_launches_per_second", "per second", [1 / seconds if seconds else None for seconds in launching]
    )


def _keys(mappings: Iterable[Mapping[_Key, object]]) -> list[_Key]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _category(side: Side, category: Category) -> int | None:
    """Bytes of a category at the peak; a side that tells categories apart but lacks this one has none of it."""
    return side.categories.get(category, 0) if side.categories else None


def _event_differences(sides: Sequence[Side], reference: int) -> list[EventDifference]:
    base = sides[reference].history
    found = []
    for index, side in enumerate(sides):
        if index == reference or base is None or side.history is None:
            continue
        difference = _first_difference(base, side.history, index)
        if difference is not None:
            found.append(difference)
    return found


def _first_difference(base: StepHistory, other: StepHistory, side: int) -> EventDifference | None:
    """The first place where the signed sizes of the two steps differ; what follows a step counts if both have it."""
    if not (_has_zero(base) and _has_zero(other)):
        base, other = _without_zero(base), _without_zero(other)
    theirs, ours = _signed(base), _signed(other)
    same = next(
        (index for index, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours))
    )
    if same == len(theirs) == len(ours):
        return None
    return EventDifference(side, same + 1, same, _in_words(base, same), _in_words(other, same))


def _has_zero(history: StepHistory) -> bool:
    return any(event.phase == "zero" for event in history.events)


def _without_zero(history: StepHistory) -> StepHistory:
    """The events up to the end of the optimizer's step: rules end there."""
    events = [event for event in history.events if event.phase != "zero"]
    return msgspec.structs.replace(history, events=events)


def _signed(history: StepHistory) -> list[int]:
    """Requested bytes of every event, negative where an allocation ends."""
    sizes = {id_: tensor.bytes for id_, tensor in enumerate(history.resident, start=1)}
    signed = []
    for event in history.events:
        if isinstance(event, Allocation):
            sizes[event.id] = event.bytes
            signed.append(event.bytes)
        else:
            signed.append(-sizes.pop(event.id))
    return signed


def _in_words(history: StepHistory, index: int) -> str | None:
    if index >= len(history.events):
        return None
    event = history.events[index]
    if isinstance(event, Allocation):
        return f"{event.phase}: allocates {event.bytes:,} B for {event.name}"
    return f"{event.phase}: frees {_name_of(history, event)}"


def _name_of(history: StepHistory, event: Event) -> str:
    if event.id <= len(history.resident):
        return history.resident[event.id - 1].name
    return next(made.name for made in history.events if isinstance(made, Allocation) and made.id == event.id)


def _tensor_differences(sides: Sequence[Side]) -> list[TensorDifference]:
    """Names whose bytes at the peak are not the same on every side that has a history, the largest difference first."""
    totals = [_by_name(side.history) if side.history else None for side in sides]
    if sum(total is not None for total in totals) < 2:
        return []
    keys = dict.fromkeys(key for total in totals if total for key in total)
    found = []
    for category, name in keys:
        values = [None if total is None else total.get((category, name), 0) for total in totals]
        if _spread(values):
            found.append(TensorDifference(name, category, values))
    return sorted(found, key=lambda difference: -_spread(difference.values))[:NUM_TENSORS]


def _spread(values: Sequence[int | None]) -> int:
    known = [value for value in values if value is not None]
    return max(known) - min(known)


def place_of(name: str) -> str:
    """The module that a tensor belongs to, which rules, traces and measurements name alike; the name's first word.

    A rule says `model.layers.0.mlp.act_fn output`, a trace `... mul`, a measurement `... forward`; what belongs to a
    parameter is named after it.
    """
    word = name.split(" ", 1)[0]
    return word.removesuffix(".weight").removesuffix(".bias")


def _by_name(history: StepHistory) -> dict[tuple[Category, str], int]:
    total: dict[tuple[Category, str], int] = {}
    for tensor in history.alive(history.peak_event):
        key = _key(tensor)
        total[key] = total.get(key, 0) + tensor.bytes
    return total


def _key(tensor: LiveTensor) -> tuple[Category, str]:
    return tensor.category, place_of(tensor.name)


def _notes(sides: Sequence[Side], reference: int) -> list[str]:
    base, notes = sides[reference], [f"{side.label}: {note}" for side in sides for note in side.notes]
    for side in sides:
        if side is base:
            continue
        different = _different_settings(base, side)
        if different:
            notes.append(f"{side.label} is of another step than {base.label}: {', '.join(different)}")
    return notes


def _different_settings(base: Side, side: Side) -> list[str]:
    pairs: dict[str, tuple[object, object]] = {
        "model": (base.model, side.model),
        "optimizer": (f"{base.optimizer} ({base.implementation})", f"{side.optimizer} ({side.implementation})"),
    }
    for field in StepConfig.__struct_fields__:
        pairs[field] = (getattr(base.config, field), getattr(side.config, field))
    return [f"{name} {theirs} -> {ours}" for name, (theirs, ours) in pairs.items() if theirs != ours]
