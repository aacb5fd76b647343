"""Replaying a timeline: how many bytes are allocated when, and what is alive at the peak.

Two ways, one result. `replay` adds up the requests, each rounded to 512 bytes: instant, and what torch would count if
every request got a block of its own size. `replay_blocks` runs them through the allocator, whose blocks may be up to
1 MiB larger than asked for, depending on what came before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import nlargest
from typing import Any, Protocol

import msgspec

from optplan.planner.allocator.caching import ROUNDING, CachingAllocator
from optplan.planner.timeline import Allocation, Category, Event, Phase
from optplan.planner.units import round_up

_LARGEST_SHOWN = 10


class LiveTensor(msgspec.Struct, frozen=True):
    """One allocation that is alive at the peak; bytes as allocated."""

    name: str
    category: Category
    bytes: int


class Replay(msgspec.Struct, frozen=True):
    """A timeline's memory in allocated bytes.

    Attributes:
        phases: Largest number of allocated bytes within each phase, its first moment included.
        peak_bytes: The largest of them.
        peak_phase: The phase in which it is first reached.
        peak_index: Index of the event that reaches it; 0 too if it is there from the start.
        categories: Bytes by category at the peak.
        largest: The largest allocations alive at the peak, largest first.
        end_bytes: Allocated bytes after the last event.
        reserved_bytes: Largest number of bytes held from the driver; None where requests are only added up.
    """

    phases: dict[Phase, int]
    peak_bytes: int
    peak_phase: Phase
    peak_index: int
    categories: dict[Category, int]
    largest: tuple[LiveTensor, ...]
    end_bytes: int
    reserved_bytes: int | None = None


def replay(timeline: Sequence[Event], *, rounding: int = ROUNDING) -> Replay:
    """Replay a timeline by adding up its requests, each rounded up to a multiple of `rounding` bytes.

    Raises:
        ValueError: The timeline is empty.
    """
    return _Player(_Sum(rounding)).play(timeline)


def replay_blocks(
    timeline: Sequence[Event], *, before: Iterable[Event] = (), allocator: CachingAllocator | None = None
) -> Replay:
    """Replay a timeline through torch's caching allocator.

    Args:
        timeline: The events whose peaks are asked for.
        before: Events that come first and leave the allocator as `timeline` finds it, such as a first step. Their ids
            continue in `timeline`.
        allocator: The allocator; a fresh one if left out.

    Raises:
        ValueError: The timeline is empty.
    """
    allocator = allocator or CachingAllocator()
    player = _Player(allocator)
    for event in before:
        player.run(event)
    return msgspec.structs.replace(player.play(timeline), reserved_bytes=allocator.reserved_bytes)


class _Memory(Protocol):
    """What hands out memory and counts it."""

    allocated_bytes: int

    def alloc(self, num_bytes: int, /, *, stream: int = 0) -> Any: ...

    def free(self, block: Any, /) -> None: ...


class _Sum:
    """Memory in which every request has a block of its own rounded size."""

    def __init__(self, rounding: int) -> None:
        self.allocated_bytes = 0
        self._rounding = rounding

    def alloc(self, num_bytes: int, *, stream: int = 0) -> int:
        del stream  # sums know no caches
        size = round_up(num_bytes, self._rounding)
        self.allocated_bytes += size
        return size

    def free(self, size: int) -> None:
        self.allocated_bytes -= size


class _Player:
    """Runs events against a memory."""

    def __init__(self, memory: _Memory) -> None:
        self._memory = memory
        self._blocks: dict[int, Any] = {}
        self._live: dict[int, LiveTensor] = {}

    def run(self, event: Event) -> None:
        """Run one event."""
        if not isinstance(event, Allocation):
            self._memory.free(self._blocks.pop(event.id))
            del self._live[event.id]
            return
        before = self._memory.allocated_bytes
        self._blocks[event.id] = self._memory.alloc(event.bytes, stream=event.stream)
        self._live[event.id] = LiveTensor(event.name, event.category, self._memory.allocated_bytes - before)

    def play(self, timeline: Sequence[Event]) -> Replay:
        """Run all events and tell their peaks."""
        if not timeline:
            raise ValueError("a timeline without events has no peak")
        phases: dict[Phase, int] = {}
        peak_bytes, num_run, alive = self._memory.allocated_bytes, 0, dict(self._live)
        changes: list[tuple[int, LiveTensor | None]] = []
        for index, event in enumerate(timeline):
            start = self._memory.allocated_bytes
            self.run(event)
            changes.append((event.id, self._live.get(event.id)))
            now = self._memory.allocated_bytes
            phases[event.phase] = max(phases.get(event.phase, start), now)
            if now > peak_bytes:
                peak_bytes, num_run = now, index + 1
        _apply(alive, changes[:num_run])
        return _result(phases, timeline, max(num_run - 1, 0), alive.values(), end_bytes=now)


def _apply(alive: dict[int, LiveTensor], changes: Iterable[tuple[int, LiveTensor | None]]) -> None:
    for id_, tensor in changes:
        if tensor is None:
            del alive[id_]
        else:
            alive[id_] = tensor


def _result(
    phases: dict[Phase, int], timeline: Sequence[Event], peak_index: int, live: Iterable[LiveTensor], *, end_bytes: int
) -> Replay:
    alive = list(live)
    categories: dict[Category, int] = {}
    for tensor in alive:
        categories[tensor.category] = categories.get(tensor.category, 0) + tensor.bytes
    largest = tuple(nlargest(_LARGEST_SHOWN, alive, key=lambda tensor: tensor.bytes))
    phase = timeline[peak_index].phase
    return Replay(phases, max(phases.values()), phase, peak_index, categories, largest, end_bytes)
