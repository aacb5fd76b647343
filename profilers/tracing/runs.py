"""A training run put together from its pieces, and what it occupies on a device of unlimited memory.

What an allocation occupies depends on what came before it, so a run is followed from the empty device: placement, a
first step in which the optimizer makes its state, then steady steps, the last of which is measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import msgspec

from optplan.planner.allocator.caching import CachingAllocator
from optplan.planner.allocator.choice import Allocator, copy_of
from optplan.planner.allocator.device import DeviceAllocator
from optplan.planner.allocator.driver import Driver
from optplan.planner.allocator.settings import AllocatorSettings
from optplan.planner.timeline import Allocation, Category, Free, Phase, Timeline

Order = Literal["ascending", "descending"]
ORDERS: tuple[Order, ...] = ("descending", "ascending")
"""Where the driver may put each new segment relative to the last; descending is what drivers mostly do."""

NUM_STEPS = 3
_APART = 1 << 40


class OptimizerPart(NamedTuple):
    """What an optimizer allocates and frees in its first `step()`, state included, and in every later one.

    Attributes:
        first: The first step.
        steady: A later one.
        renewed: State that a later step replaces by a new tensor: the id that ends, by the id that takes its place.
    """

    first: Timeline
    steady: Timeline
    renewed: Mapping[int, int] = MappingProxyType({})

    @classmethod
    def of(cls, first: Timeline, steady: Timeline) -> OptimizerPart:
        """The part, with what is renewed paired in order."""
        made = {event.id for event in steady if isinstance(event, Allocation)}
        ended = {event.id for event in steady if isinstance(event, Free)}
        outside = [event.id for event in steady if isinstance(event, Free) and event.id not in made]
        kept = [event.id for event in steady if isinstance(event, Allocation) and event.id not in ended]
        return cls(first, steady, dict(zip(kept, outside, strict=True)))

    def apart(self) -> OptimizerPart:
        """The same part with ids that no piece of a run has, so that it goes with the pieces of any run."""
        first, steady = (
            [msgspec.structs.replace(event, id=event.id + _APART) for event in timeline]
            for timeline in (self.first, self.steady)
        )
        return OptimizerPart(first, steady, {new + _APART: old + _APART for new, old in self.renewed.items()})


class Pieces(NamedTuple):
    """The pieces of a training run, all but the optimizer's.

    Attributes:
        load: Placement of the module and its inputs.
        first: Micro-steps of the first step.
        steady: Micro-steps of a later step.
        clip: Gradient clipping.
        zero: The end of the gradients.
        second: Micro-steps of the second step, where it is unlike the later ones.
        early_zeros: The end of the gradients of the first and the second step, where they are not those of later ones.
    """

    load: Timeline
    first: tuple[Timeline, ...]
    steady: tuple[Timeline, ...]
    clip: Timeline
    zero: Timeline
    second: tuple[Timeline, ...] = ()
    early_zeros: tuple[Timeline, ...] = ()

    def micro_steps(self, step: int) -> tuple[Timeline, ...]:
        """Those of a step, counted from 0."""
        return self.first if step == 0 else self.second if step == 1 and self.second else self.steady

    def end(self, step: int) -> Timeline:
        """The end of a step's gradients."""
        return self.early_zeros[step] if step < len(self.early_zeros) else self.zero


class SimulatedRun(msgspec.Struct, frozen=True):
    """A run on the simulated device; bytes.

    Attributes:
        phases: Largest number of allocated bytes in each phase of the last step.
        categories: Allocated bytes by category at the largest of them.
        first_peak_bytes: Largest number of allocated bytes in the first step.
        reserved_bytes: Largest number of bytes held from the driver, over the whole run.
    """

    phases: dict[Phase, int]
    categories: dict[Category, int]
    first_peak_bytes: int
    reserved_bytes: int

    @property
    def peak_phase(self) -> Phase:
        """The phase with the largest peak, of equal ones the earliest."""
        return max(self.phases, key=lambda phase: self.phases[phase])

    @property
    def peak_bytes(self) -> int:
        """The largest of the phases' peaks."""
        return max(self.phases.values())


def run_timeline(pieces: Pieces, optimizer: OptimizerPart, *, num_steps: int = NUM_STEPS) -> Timeline:
    """The whole run as one timeline with ids of its own; steps follow one another in it."""
    current: dict[int, int] = {}
    timeline: Timeline = []
    for piece in run_pieces(pieces, optimizer, num_steps=num_steps):
        for event in piece:
            if isinstance(event, Allocation):
                current[event.id] = id_ = len(timeline) + 1
                timeline.append(msgspec.structs.replace(event, id=id_))
            else:
                timeline.append(Free(current.pop(event.id), event.phase))
        if piece is optimizer.steady:
            current |= {old: current.pop(new) for new, old in optimizer.renewed.items()}
    return timeline


def run_pieces(pieces: Pieces, optimizer: OptimizerPart, *, num_steps: int = NUM_STEPS) -> Iterator[Timeline]:
    """The pieces in the order in which the run goes through them."""
    yield pieces.load
    for step in range(num_steps):
        part = optimizer.steady if step else optimizer.first
        yield from (*pieces.micro_steps(step), pieces.clip, part, pieces.end(step))


def spliced(timeline: Timeline, ends: Mapping[int, OptimizerPart], *, is_first: bool = True) -> Timeline:
    """A micro-step with optimizers' steps within it.

    Args:
        timeline: The micro-step.
        ends: The steps by the id of the gradient that each uses, right before whose end it comes.
        is_first: Whether the steps make their state.
    """
    result: Timeline = []
    offset = _APART
    for event in timeline:
        part = ends.get(event.id) if isinstance(event, Free) else None
        if part is not None:
            inner = part.first if is_first else part.steady
            result += [msgspec.structs.replace(e, id=e.id + offset, phase="backward") for e in inner]
            offset += _APART
        result.append(event)
    return result


class _Event(NamedTuple):
    """An allocation with its bytes, or with a negative id its end."""

    id: int
    num_bytes: int
    category: Category
    phase: Phase
    stream: int = 0


_Events = Sequence[_Event]


class RunSimulator:
    """Simulates runs that differ only in the optimizer; what they share is simulated once."""

    def __init__(
        self,
        pieces: Pieces,
        order: Order = "descending",
        *,
        settings: AllocatorSettings | None = None,
        empties_cache: bool = False,
    ) -> None:
        """Run the first step up to the optimizer.

        Args:
            pieces: The run.
            order: Where the driver puts each new segment relative to the last.
            settings: The allocator's; torch's own when None.
            empties_cache: Whether cached segments are given back after every step.
        """
        self._empties_cache = empties_cache
        self._second, self._steady = (
            [_compact(piece) for piece in (*pieces.micro_steps(step), pieces.clip) if piece] for step in (1, 2)
        )
        self._zeros = [_compact(pieces.end(step)) for step in range(NUM_STEPS)]
        self._start = _Device(_allocator(settings or AllocatorSettings(), order))
        self._start.run(_compact(pieces.load))
        self._first_peak = 0
        for piece in (*pieces.first, pieces.clip):
            self._first_peak = max(self._first_peak, self._start.run(_compact(piece)))

    def simulate(self, optimizer: OptimizerPart, *, num_steps: int = NUM_STEPS) -> SimulatedRun:
        """The run with one optimizer."""
        device = self._start.copy()
        first_peak = max(self._first_peak, device.run(_compact(optimizer.first)))
        device.run(self._zeros[0])
        self._end_step(device)
        step = _compact(optimizer.steady)
        for number in range(1, num_steps - 1):
            micro_steps = self._second if number == 1 else self._steady
            for piece in (*micro_steps, step, self._zeros[min(number, 2)]):
                device.run(piece)
            device.rename(optimizer.renewed)
            self._end_step(device)
        return device.measure([*self._steady, step], first_peak)

    def _end_step(self, device: _Device) -> None:
        if self._empties_cache:
            device.empty_cache()


def _allocator(settings: AllocatorSettings, order: Order) -> Allocator:
    if settings.is_plain:
        return CachingAllocator(segment_addresses=order)
    return DeviceAllocator(settings, driver=Driver(addresses=_Ascending() if order == "ascending" else None))


class _Ascending:
    """A driver's addresses where each segment lies above all before it."""

    def __init__(self) -> None:
        self._next = 0

    def of_segment(self, size: int, /) -> int | None:
        self._next += size
        return self._next - size

    def of_range(self, stream: int, small: bool, span: int, /) -> int | None:
        del stream, small, span
        return None

    def range_ended(self, start: int, /) -> None:
        del start


def _compact(timeline: Iterable[Allocation | Free]) -> _Events:
    return [
        _Event(event.id, event.bytes, event.category, event.phase, event.stream)
        if isinstance(event, Allocation)
        else _Event(-event.id, 0, "workspace", event.phase)
        for event in timeline
    ]


class _Device:
    """An allocator, and the blocks that serve what is alive."""

    def __init__(self, allocator: Allocator) -> None:
        self._allocator: Any = allocator
        self._blocks: dict[int, tuple[Any, Category]] = {}
        self._reserved_before = 0

    def copy(self) -> _Device:
        """A device in the same state."""
        allocator, twins = copy_of(self._allocator, [block for block, _ in self._blocks.values() if block is not None])
        other = _Device(allocator)
        other._blocks = {
            id_: (None if block is None else twins[block], category) for id_, (block, category) in self._blocks.items()
        }
        return other

    def empty_cache(self) -> None:
        """Give back the cached segments."""
        self._reserved_before = max(self._reserved_before, self._allocator.reserved_bytes)
        self._allocator.empty_cache()

    def run(self, events: _Events) -> int:
        """Run events; the largest number of allocated bytes after one of them."""
        blocks, allocator = self._blocks, self._allocator
        alloc, free, most = allocator.alloc, allocator.free, allocator.allocated_bytes
        for id_, num_bytes, category, _, stream in events:
            if id_ > 0:
                blocks[id_] = (alloc(num_bytes, stream=stream), category)
                most = max(most, allocator.allocated_bytes)
            else:
                free(blocks.pop(-id_)[0])
        return int(most)

    def rename(self, renewed: Mapping[int, int]) -> None:
        """Let what took another's place be known by the other's id."""
        self._blocks |= {old: self._blocks.pop(new) for new, old in renewed.items()}

    def measure(self, pieces: Sequence[_Events], first_peak: int) -> SimulatedRun:
        """Run a step and tell the peak of each phase; of forward and backward, those that come last."""
        allocator, peaks = self._allocator, _Peaks(self._categories(), self._allocator.allocated_bytes)
        for piece in pieces:
            peaks.begin_piece(piece[0].phase if piece else "step")
            for id_, num_bytes, category, phase, stream in piece:
                if id_ > 0:
                    block = allocator.alloc(num_bytes, stream=stream)
                    self._blocks[id_] = (block, category)
                    peaks.change(phase, category, block.size if block else 0)
                else:
                    block, owner = self._blocks.pop(-id_)
                    peaks.change(phase, owner, -block.size if block else 0)
                    allocator.free(block)
        reserved = max(self._reserved_before, allocator.reserved_bytes)
        return SimulatedRun(peaks.phases, peaks.categories(), first_peak, reserved)

    def _categories(self) -> dict[Category, int]:
        totals: dict[Category, int] = {}
        for block, category in self._blocks.values():
            totals[category] = totals.get(category, 0) + (block.size if block else 0)
        return totals


class _Peaks:
    """Follows allocated bytes through a step; a phase begins with what the one before it has left."""

    def __init__(self, in_use: dict[Category, int], allocated: int) -> None:
        self.phases: dict[Phase, int] = {}
        self._in_use = in_use
        self._allocated = allocated
        self._phase: Phase | None = None
        self._most = 0
        self._at_peak: dict[Category, int] = {}

    def begin_piece(self, phase: Phase) -> None:
        """Begin a piece with this phase: its phases count anew."""
        self._phase = phase
        self.phases[phase] = self._allocated
        if not self._at_peak:
            self._most, self._at_peak = self._allocated, dict(self._in_use)

    def change(self, phase: Phase, category: Category, num_bytes: int) -> None:
        """Note that allocated bytes change."""
        if phase != self._phase:
            self._phase = phase
            self.phases[phase] = self._allocated
        self._allocated += num_bytes
        self._in_use[category] = self._in_use.get(category, 0) + num_bytes
        if self._allocated > self.phases[phase]:
            self.phases[phase] = self._allocated
        if self._allocated > self._most:
            self._most = self._allocated
            self._at_peak = dict(self._in_use)

    def categories(self) -> dict[Category, int]:
        """Bytes by category at the peak."""
        return {category: size for category, size in self._at_peak.items() if size}
