"""A steady step as it was replayed or measured: its events and what was allocated after each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import msgspec

from optplan.planner.replay import LiveTensor
from optplan.planner.timeline import Allocation, Event, Phase


class PhaseSpan(msgspec.Struct, frozen=True):
    """The events of one phase, first and last included, and the most that was allocated within it."""

    phase: Phase
    first_event: int
    last_event: int
    peak_allocated_bytes: int


class StepHistory(msgspec.Struct, frozen=True):
    """A steady step as it was replayed.

    Attributes:
        resident: What is alive before the first event, with the bytes of its blocks. Its ids are 1, 2 ... in this
            order, so that an event may free it.
        events: The step's allocations and frees.
        allocated: Allocated bytes before the first event and after each.
        reserved_bytes: Most bytes held from the driver.
    """

    resident: Sequence[LiveTensor]
    events: Sequence[Event]
    allocated: Sequence[int]
    reserved_bytes: int

    @property
    def peak_event(self) -> int:
        """Number of the event that reaches the peak first; 0 if it is there from the start."""
        return self.allocated.index(max(self.allocated))

    def alive(self, event: int) -> list[LiveTensor]:
        """The tensors alive after event number `event`, with the bytes that the allocator gave them."""
        live = dict(enumerate(self.resident, start=1))
        for index, made in enumerate(self.events[:event]):
            if isinstance(made, Allocation):
                size = self.allocated[index + 1] - self.allocated[index]
                live[made.id] = LiveTensor(made.name, made.category, size)
            else:
                del live[made.id]
        return list(live.values())

    def spans(self) -> list[PhaseSpan]:
        """The phases in their order; a phase begins with what the one before it has left."""
        spans = []
        for phase, members in groupby(range(len(self.events)), key=lambda index: self.events[index].phase):
            numbers = [index + 1 for index in members]
            most = max(self.allocated[numbers[0] - 1 : numbers[-1] + 1])
            spans.append(PhaseSpan(phase, numbers[0], numbers[-1], most))
        return spans
