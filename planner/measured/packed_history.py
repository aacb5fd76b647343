"""A step's history as columns of numbers beside tables of names: the form in which it is saved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import msgspec

from optplan.planner.errors import ConfigError
from optplan.planner.replay import LiveTensor
from optplan.planner.step_history import StepHistory
from optplan.planner.timeline import Allocation, Category, Event, Free, Phase

_T = TypeVar("_T")


class PackedHistory(msgspec.Struct, frozen=True, kw_only=True):
    """A `StepHistory` in columns, one entry an event.

    Attributes:
        resident: What is alive before the first event.
        names: Every name that occurs.
        phases: Every phase that occurs.
        categories: Every category that occurs.
        ids: The allocation's id, or the same negative where it ends.
        bytes: Requested bytes, 0 where an allocation ends.
        name: Index into `names`, 0 where an allocation ends; likewise `category`, `phase` (of every event), `itemsize`.
        allocated: Allocated bytes before the first event and after each.
        reserved_bytes: Most bytes held from the driver.
    """

    resident: list[LiveTensor]
    names: list[str]
    phases: list[Phase]
    categories: list[Category]
    ids: list[int]
    bytes: list[int]
    name: list[int]
    category: list[int]
    phase: list[int]
    itemsize: list[int]
    allocated: list[int]
    reserved_bytes: int


def pack(history: StepHistory) -> PackedHistory:
    """The history in columns."""
    made = [event if isinstance(event, Allocation) else None for event in history.events]
    names = _table(event.name for event in made if event)
    categories = _table(event.category for event in made if event)
    phases = _table(event.phase for event in history.events)
    return PackedHistory(
        resident=list(history.resident),
        names=list(names),
        phases=list(phases),
        categories=list(categories),
        ids=[event.id if isinstance(event, Allocation) else -event.id for event in history.events],
        bytes=[event.bytes if event else 0 for event in made],
        name=[names[event.name] if event else 0 for event in made],
        category=[categories[event.category] if event else 0 for event in made],
        phase=[phases[event.phase] for event in history.events],
        itemsize=[event.itemsize if event else 0 for event in made],
        allocated=list(history.allocated),
        reserved_bytes=history.reserved_bytes,
    )


def unpack(packed: PackedHistory) -> StepHistory:
    """The history that was packed.

    Raises:
        ConfigError: The columns contradict each other: the record was damaged or not made by optplan.
    """
    columns = (packed.bytes, packed.name, packed.category, packed.phase, packed.itemsize)
    lengths = {len(packed.ids), len(packed.allocated) - 1, *map(len, columns)}
    if len(lengths) != 1:
        raise ConfigError(f"damaged timeline: its columns have {_listed(lengths)} entries; allowed: one length for all")
    try:
        events = [_event(packed, index) for index in range(len(packed.ids))]
    except IndexError:
        raise ConfigError("damaged timeline: an event refers to a name, phase or category that is not there") from None
    _check_ids(packed.ids, len(packed.resident))
    return StepHistory(packed.resident, events, packed.allocated, packed.reserved_bytes)


def _event(packed: PackedHistory, index: int) -> Event:
    id_, phase = packed.ids[index], packed.phases[packed.phase[index]]
    if id_ < 0:
        return Free(-id_, phase)
    category, name = packed.categories[packed.category[index]], packed.names[packed.name[index]]
    return Allocation(id_, packed.bytes[index], category, name, phase, packed.itemsize[index])


def _check_ids(ids: Sequence[int], num_resident: int) -> None:
    live = set(range(1, num_resident + 1))
    for id_ in ids:
        if (-id_ not in live) if id_ < 0 else (id_ == 0 or id_ in live):
            raise ConfigError(f"damaged timeline: allocation {abs(id_)} is made or ended twice")
        if id_ < 0:
            live.remove(-id_)
        else:
            live.add(id_)


def _table(values: Iterable[_T]) -> dict[_T, int]:
    """Each value with its index, in the order in which they first occur."""
    return {value: index for index, value in enumerate(dict.fromkeys(values))}


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(str(number) for number in sorted(numbers))
