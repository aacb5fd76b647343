"""A device in a simulated training run: what is kept for good, and the peaks of the steady step."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Iterable, Sequence
from itertools import islice
from operator import itemgetter
from typing import Any, NamedTuple

import msgspec

from optplan.planner.allocator.caching import CachingAllocator
from optplan.planner.allocator.choice import copy_of, make_allocator
from optplan.planner.allocator.pools import DevicePool
from optplan.planner.allocator.settings import AllocatorSettings
from optplan.planner.replay import LiveTensor
from optplan.planner.step_history import StepHistory
from optplan.planner.timeline import Allocation, Category, Event, Free, Phase

KEPT = 0
"""Id of an allocation that stays for the rest of the run."""


class SimulatedEvent(NamedTuple):
    """An allocation with its bytes, name and stream, or with the negative id its end.

    The category is the memory's in both.
    """

    id: int
    num_bytes: int
    category: Category
    phase: Phase
    name: str
    stream: int = 0


class SimulatedStep(msgspec.Struct, frozen=True):
    """A steady step on a device with room for all it asks.

    Attributes:
        phases: Largest number of allocated bytes in forward, backward and step, and in clip if gradients are clipped.
        categories: Allocated bytes by category at the largest of them.
        reserved_bytes: Largest number of bytes held from the driver, cached blocks included.
        reserved_range_bytes: Least and most of it, where that depends on how far another thread has come.
    """

    phases: dict[Phase, int]
    categories: dict[Category, int]
    reserved_bytes: int
    reserved_range_bytes: tuple[int, int] | None = None

    @property
    def peak_phase(self) -> Phase:
        """The phase with the largest peak, of equal ones the earliest."""
        return max(self.phases, key=lambda phase: self.phases[phase])


class SimulatedDevice:
    """An allocator and the memory of one run: what is kept for good, and what the current step has allocated."""

    def __init__(self, settings: AllocatorSettings, *, allowed_bytes: int | None = None) -> None:
        self._settings = settings
        self._allocator = make_allocator(settings, allowed_bytes=allowed_bytes)
        self._kept: list[tuple[str, Category, int]] = []
        self._held: list[tuple[str, Category, Any]] = []
        self._segments: list[tuple[Sequence[SimulatedEvent], list[int]]] = []
        self._num_earlier_gradients = 0
        self._blocks: dict[int, Any] = {}
        self._gradients: list[Any] = []
        self._phases: dict[Phase, int] = {}
        self._categories: dict[Category, int] = {}
        self._reserved_before_flush = 0

    def copy(self) -> SimulatedDevice:
        """A device in the same state, between two parts of a step."""
        other = SimulatedDevice(self._settings)
        held = [block for _, _, block in self._held]
        other._allocator, twins = copy_of(self._allocator, filter(None, [*self._gradients, *held]))
        other._kept = list(self._kept)
        other._held = [(name, category, twins[block]) for name, category, block in self._held]
        other._gradients = [block and twins[block] for block in self._gradients]
        return other

    @property
    def cached_layout(self) -> Hashable:
        """What is cached; None on a device without limit, and under settings by which more than that decides.

        Which block serves a request follows from the cached blocks' sizes and from the order of their addresses, and
        which can be given back from whether their segments are in use elsewhere. What outlives steps never moves: two
        moments of a run between whole steps that agree in this are followed by the same.
        """
        allocator = self._allocator
        if isinstance(allocator, CachingAllocator) or not self._settings.is_plain:
            return None
        pools = tuple((pool.stream, pool.small, _sizes(pool)) for pool in allocator.pools())
        return allocator.reserved_bytes, allocator.allocated_bytes, pools

    @property
    def num_flushes(self) -> int:
        """How often a request found no room until the allocator had given back its cache (`num_alloc_retries`)."""
        return 0 if isinstance(self._allocator, CachingAllocator) else self._allocator.num_alloc_retries

    def empty_cache(self) -> None:
        """Give back the cached segments."""
        self._reserved_before_flush = max(self._reserved_before_flush, self._allocator.reserved_bytes)
        self._allocator.empty_cache()

    def keep(self, num_bytes: int, category: Category, name: str) -> None:
        """Allocate for the rest of the run."""
        block = self._allocator.alloc(num_bytes)
        if block is not None:
            self._kept.append((name, category, block.size))

    def hold(self, tensors: Iterable[tuple[str, int, Category]]) -> None:
        """Allocate what lives until it is replaced; each with its name, bytes and category."""
        self._held += [(name, category, self._allocator.alloc(num_bytes)) for name, num_bytes, category in tensors]

    def pass_through(self, sizes: Iterable[int]) -> None:
        """Allocate and free one after another, each when the second before it has gone."""
        alive: list[Any] = []
        for num_bytes in sizes:
            if len(alive) == 2:
                self._allocator.free(alive.pop(0))
            alive.append(self._allocator.alloc(num_bytes))
        for block in alive:
            self._allocator.free(block)

    def free_held(self, count: int) -> None:
        """Free the first `count` of what is held."""
        for _, _, block in self._held[:count]:
            self._allocator.free(block)
        del self._held[:count]

    def free_last(self, count: int) -> None:
        """Free the last `count` of what is held."""
        for _, _, block in self._held[len(self._held) - count :]:
            self._allocator.free(block)
        del self._held[len(self._held) - count :]

    def set_aside(self) -> None:
        """Keep the gradients, all that a micro-step leaves, to the end of the step; the ids to come may be the same."""
        self._gradients += self._blocks.values()
        self._blocks.clear()

    def clear(self) -> None:
        """Free the gradients, first the parameter's whose gradient came last."""
        for block in reversed(self._gradients):
            self._allocator.free(block)
        self._gradients.clear()

    def run(self, events: Sequence[SimulatedEvent]) -> None:
        """Run events."""
        blocks, alloc, free = self._blocks, self._allocator.alloc, self._allocator.free
        for id_, num_bytes, category, _, name, stream in events:
            if id_ > 0:
                blocks[id_] = alloc(num_bytes, stream=stream)
            elif id_ < 0:
                free(blocks.pop(-id_))
            else:
                self.keep(num_bytes, category, name)

    def measure(self, events: Sequence[SimulatedEvent], *phases: Phase) -> None:
        """Run the events of these phases and note their peaks; the first begins with what is alive now."""
        allocator, blocks = self._allocator, self._blocks
        alloc, free = allocator.alloc, allocator.free
        in_use = self._in_use()
        history = [allocator.allocated_bytes]
        for id_, num_bytes, _, _, _, stream in events:
            if id_ > 0:
                blocks[id_] = alloc(num_bytes, stream=stream)
            else:
                free(blocks.pop(-id_))
            history.append(allocator.allocated_bytes)
        if not self._segments:
            self._num_earlier_gradients = len(self._gradients)
        self._segments.append((events, history))
        self._note(events, phases, history, in_use)

    def _note(
        self, events: Sequence[SimulatedEvent], phases: Sequence[Phase], history: list[int], in_use: dict[Category, int]
    ) -> None:
        before = max(self._phases.values(), default=-1)
        start = 0
        for phase in phases:
            # The events lie in the order of the phases; a phase begins with what the one before it has left.
            end = bisect_left(events, True, lo=start, key=lambda event: event.phase != phase)
            self._phases[phase] = max(history[start : end + 1])
            start = end
        peak = max(history)
        if peak > before:
            at_peak = history.index(peak)
            sizes = zip(events[:at_peak], history, islice(history, 1, None), strict=False)
            for (_, _, category, _, _, _), below, above in sizes:
                in_use[category] = in_use.get(category, 0) + above - below
            self._categories = in_use

    def _in_use(self) -> dict[Category, int]:
        total: dict[Category, int] = {}
        for _, category, size in self._lasting():
            total[category] = total.get(category, 0) + size
        made = sum(block.size for block in self._gradients if block is not None)
        return total | {"gradients": total.get("gradients", 0) + made}

    def _lasting(self) -> list[tuple[str, Category, int]]:
        """What outlives the step, with the bytes of its blocks."""
        return [*self._kept, *((name, category, block.size) for name, category, block in self._held)]

    def history(self) -> StepHistory:
        """The measured step event by event."""
        earlier = [block for block in self._gradients[: self._num_earlier_gradients] if block is not None]
        kept = [LiveTensor("gradient that is there already", "gradients", block.size) for block in earlier]
        resident = [*(LiveTensor(*tensor) for tensor in self._lasting()), *kept]
        allocated, events, base = self._segments[0][1][:1], [], len(resident)
        for segment, history in self._segments:
            events += [_named(event, base) for event in segment]
            allocated += history[1:]
            base += max((event.id for event in segment), default=0)
        reserved_bytes = max(self._reserved_before_flush, self._allocator.reserved_bytes)
        return StepHistory(resident, events, allocated, reserved_bytes)

    def result(self) -> SimulatedStep:
        """What the measured step held."""
        categories = {category: size for category, size in self._categories.items() if size}
        reserved_bytes = max(self._reserved_before_flush, self._allocator.reserved_bytes)
        return SimulatedStep(self._phases, categories, reserved_bytes)


def _sizes(pool: DevicePool) -> Hashable:
    """Size of each cached block by rising address, and whether its segment holds others too."""
    cached = sorted(pool.cached, key=itemgetter(1))
    return tuple((size, block.is_split) for size, _, block in cached)


def _named(event: SimulatedEvent, base: int) -> Event:
    """An event with its id moved up by `base`."""
    if event.id < 0:
        return Free(base - event.id, event.phase)
    return Allocation(base + event.id, event.num_bytes, event.category, event.name, event.phase, stream=event.stream)
