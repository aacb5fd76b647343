"""From the allocator's own record of a step to the step's history: every event with category, name and phase."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from optplan.planner.history.events import HistoryEvent
from optplan.planner.replay import LiveTensor
from optplan.planner.step_history import StepHistory
from optplan.planner.timeline import Allocation, Category, Event, Free, Phase
from optplan.planner.units import KIB, MIB
from optplan.profilers.live.communication import BUCKET, CAST, NamedEvents
from optplan.profilers.live.owners import Owner
from optplan.profilers.live.phases import Mark

UNEXPLAINED: Category = "unexplained"
WORKSPACE_BYTES = frozenset({32 * MIB, 8 * MIB + 128 * KIB, MIB})
"""Sizes of the workspaces that cuBLAS and cuBLASLt keep for each thread (torch `CublasHandlePool.cpp`)."""


class Communication(NamedTuple):
    """What training on several GPUs makes by itself.

    Attributes:
        ranges: Events whose owner is known.
        has_streams: Whether what is made on other streams than the first is made for communication.
        bucket_sizes: Bytes of blocks that are DDP's buckets.
    """

    ranges: Sequence[NamedEvents] = ()
    has_streams: bool = False
    bucket_sizes: frozenset[int] = frozenset()


class StartingBlock(NamedTuple):
    """A block in use before the step: where it begins and its bytes."""

    address: int
    size: int


class Ownership(NamedTuple):
    """The owners of storages by address, as they are after `event` allocations and frees of the step."""

    event: int
    owners: Mapping[int, Owner]


def step_history(
    events: Sequence[HistoryEvent],
    *,
    allocated: Sequence[int],
    start: Sequence[StartingBlock],
    marks: Sequence[Mark],
    ownerships: Sequence[Ownership],
    reserved_bytes: int,
    communication: Communication = Communication(),  # noqa: B008 - a tuple
) -> StepHistory:
    """Name every event of a recorded step.

    Args:
        events: The allocations and requested frees of the step, in order, nothing else.
        allocated: Allocated bytes before the first of them and after each.
        start: The blocks in use before.
        marks: Phases and modules by number of events; the first is at 0.
        ownerships: Owners at several moments, the first before the step, in order.
        reserved_bytes: Most bytes held from the driver.
        communication: What training on several GPUs made by itself.
    """
    ids = {block.address: index for index, block in enumerate(start, start=1)}
    made: list[Event] = []
    labels: dict[int, Owner] = {}
    moments = list(ownerships[1:])
    named = _named(communication.ranges)
    for number, event in enumerate(events):
        mark = marks[bisect_right(marks, number, key=lambda mark: mark.event) - 1]
        _label(ids, labels, moments, number)
        if event.action == "alloc":
            id_ = len(start) + number + 1
            ids[event.address] = id_
            category, name = named.get(number) or _of_stream(event, communication) or _scope(mark)
            made.append(Allocation(id_, event.size, category, name, mark.phase))
        else:
            made.append(Free(ids.pop(event.address), mark.phase))
    _label(ids, labels, moments, len(events) + 1)
    return StepHistory(
        [
            _resident(block, ownerships[0].owners.get(block.address) or labels.get(number), communication)
            for number, block in enumerate(start, start=1)
        ],
        [_relabelled(event, labels) for event in made],
        allocated,
        reserved_bytes,
    )


def phase_peaks(marks: Sequence[Mark], allocated: Sequence[int]) -> dict[Phase, int]:
    """Most bytes allocated in each phase, one without an event of its own included; a clip without events is none.

    Args:
        marks: Phases by number of events, in order.
        allocated: Allocated bytes before the first event and after each.
    """
    peaks: dict[Phase, int] = {}
    ends = [mark.event for mark in marks[1:]] + [len(allocated) - 1]
    for mark, end in zip(marks, ends, strict=True):
        if mark.phase != "clip" or end > mark.event:
            peaks[mark.phase] = max(peaks.get(mark.phase, 0), *allocated[mark.event : end + 1])
    return peaks


def _label(ids: Mapping[int, int], labels: dict[int, Owner], moments: list[Ownership], number: int) -> None:
    """Give the allocations alive at each moment passed by event `number` the owners that they have then."""
    while moments and moments[0].event <= number:
        for address, owner in moments.pop(0).owners.items():
            if address in ids:
                labels.setdefault(ids[address], owner)


def _relabelled(event: Event, labels: Mapping[int, Owner]) -> Event:
    owner = labels.get(event.id)
    if owner is None or not isinstance(event, Allocation):
        return event
    return Allocation(event.id, event.bytes, owner.category, owner.name, event.phase)


def _named(ranges: Sequence[NamedEvents]) -> dict[int, Owner]:
    """Owners by number of event; of ranges within others the inner ones count, which begin later."""
    return {number: owner for begin, end, owner in ranges for number in range(begin, end)}


def _of_stream(event: HistoryEvent, communication: Communication) -> Owner | None:
    return Owner(*CAST) if communication.has_streams and event.stream else None


def _resident(block: StartingBlock, owner: Owner | None, communication: Communication) -> LiveTensor:
    """A block alive before the step; one whose owner shows only later in it is the owner's, too."""
    if owner is not None:
        return LiveTensor(owner.name, owner.category, block.size)
    if block.size in communication.bucket_sizes:
        return LiveTensor(BUCKET, "communication", block.size)
    if block.size in WORKSPACE_BYTES:
        return LiveTensor("cuBLAS workspace, known by its size", "workspace", block.size)
    return LiveTensor("alive before the step, owner unknown", UNEXPLAINED, block.size)


def _scope(mark: Mark) -> Owner:
    """What an allocation without an owner is for, from the code that made it."""
    if mark.phase in ("step", "clip"):
        return Owner("optimizer_temporaries", f"{mark.phase} temporary")
    if mark.phase == "zero":
        return Owner(UNEXPLAINED, "between two steps")
    category: Category = "logits_and_loss" if mark.in_loss else "activations"
    place = mark.path or ("loss" if mark.in_loss else "model")
    return Owner(category, f"{place} {mark.phase}")
