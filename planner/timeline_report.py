"""The record of `optplan timeline`: one steady step moment by moment, and what is alive at its peak."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import nlargest
from itertools import pairwise
from typing import Any, Literal

import msgspec

from optplan.planner.records import GpuRow, ModelRow, StepConfig
from optplan.planner.replay import LiveTensor
from optplan.planner.step_history import PhaseSpan, StepHistory
from optplan.planner.timeline import Allocation, Category, Phase

NUM_POINTS = 400
"""Most points of a curve; a longer step is drawn by the highest moment of each stretch of events."""
NUM_TENSORS = 20


class CurvePoint(msgspec.Struct, frozen=True):
    """One moment of the step.

    Attributes:
        event: Number of the event after which it is; 0 is the moment before the first.
        phase: Phase of that event.
        name: What the event allocated or freed.
        allocated_bytes: Bytes allocated, which the categories add up to.
        categories: Those bytes by category.
    """

    event: int
    phase: Phase
    name: str
    allocated_bytes: int
    categories: dict[Category, int]


class PeakChange(msgspec.Struct, frozen=True):
    """One change of the step and the peak it would have.

    Attributes:
        change: The options to add or change, as on the command line.
        addresses: The category at the peak that it makes smaller.
        why: What it does to that category.
        peak_allocated_bytes: The peak with it.
        saved_bytes: How much lower that is.
    """

    change: str
    addresses: Category
    why: str
    peak_allocated_bytes: int
    saved_bytes: int


class TimelineReport(msgspec.Struct, frozen=True, kw_only=True):
    """One steady step with one optimizer; allocated bytes per GPU.

    Attributes:
        num_events: Allocations and frees of the step.
        peak_event: Number of the event that reaches the peak first.
        alive: The largest tensors alive at the peak, largest first.
        alive_count: How many are alive there in all.
        curve: The step from its first moment to its last, the peak among its points.
        changes: What would lower the peak, most first; none that leaves it as it is.
        fits: Whether an estimate says that the step fits; near the limit fragmentation can refuse what bytes allow.
        headroom_bytes: Usable bytes less the peak, as the estimate has them; None in records of earlier versions.
    """

    schema: Literal["optplan.timeline/1"] = "optplan.timeline/1"
    version: str
    engine: str
    model: ModelRow
    gpu: GpuRow
    config: StepConfig
    optimizer: str
    implementation: str
    options: dict[str, Any]
    num_events: int
    phases: list[PhaseSpan]
    peak_allocated_bytes: int
    peak_phase: Phase
    peak_event: int
    peak_reserved_bytes: int
    peak_categories: dict[Category, int]
    alive: list[LiveTensor]
    alive_count: int
    curve: list[CurvePoint]
    changes: list[PeakChange]
    fits: bool
    headroom_bytes: int | None = None
    notes: list[str] = []


def curve(history: StepHistory, *, num_points: int = NUM_POINTS) -> list[CurvePoint]:
    """The step's moments, or of a long step the highest moment of each of `num_points` stretches of equal length."""
    chosen = set(_highest_moments(history.allocated, num_points))
    in_use = categories_of(history.resident)
    owners = {id_: (tensor.category, tensor.name) for id_, tensor in enumerate(history.resident, start=1)}
    first = history.events[0].phase
    points = [CurvePoint(0, first, "", history.allocated[0], dict(in_use))] if 0 in chosen else []
    for number, event in enumerate(history.events, start=1):
        change = history.allocated[number] - history.allocated[number - 1]
        if isinstance(event, Allocation):
            owners[event.id] = (event.category, event.name)
        category, name = owners[event.id]
        in_use[category] = in_use.get(category, 0) + change
        if number in chosen:
            used = {kind: size for kind, size in in_use.items() if size}
            points.append(CurvePoint(number, event.phase, name, history.allocated[number], used))
    return points


def categories_of(tensors: Sequence[LiveTensor]) -> dict[Category, int]:
    """Bytes of the tensors by category, in the order in which the categories first occur."""
    total: dict[Category, int] = {}
    for tensor in tensors:
        total[tensor.category] = total.get(tensor.category, 0) + tensor.bytes
    return total


def largest(tensors: Sequence[LiveTensor], *, count: int = NUM_TENSORS) -> list[LiveTensor]:
    """The largest tensors, largest first, equal ones in the order of their making."""
    return nlargest(count, tensors, key=lambda tensor: tensor.bytes)


def _highest_moments(allocated: Sequence[int], num_points: int) -> list[int]:
    count = min(num_points, len(allocated))
    edges = [len(allocated) * index // count for index in range(count + 1)]
    return [max(range(low, high), key=allocated.__getitem__) for low, high in pairwise(edges)]
