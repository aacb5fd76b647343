"""The last step of a traced run event by event, with what the allocator gave each request."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec

from optplan.planner.allocator.choice import make_allocator
from optplan.planner.allocator.settings import AllocatorSettings
from optplan.planner.replay import LiveTensor
from optplan.planner.step_history import StepHistory
from optplan.planner.timeline import Event, Free, Timeline
from optplan.profilers.tracing.runs import NUM_STEPS, OptimizerPart, Pieces, run_timeline


def run_history(
    pieces: Pieces, optimizer: OptimizerPart, *, settings: AllocatorSettings, empties_cache: bool
) -> StepHistory:
    """The run's last step; the segments of the simulated device have descending addresses, as drivers mostly do.

    Args:
        pieces: All of the run but the optimizer's.
        optimizer: Its steps.
        settings: Those of torch's allocator.
        empties_cache: Whether cached segments are given back after every step.
    """
    timeline = run_timeline(pieces, optimizer)
    ends = [len(run_timeline(pieces, optimizer, num_steps=count)) for count in range(1, NUM_STEPS)]
    replay = _Replay(settings)
    for start, end in pairwise([0, *ends]):
        replay.run(timeline[start:end])
        if empties_cache:
            replay.empty_cache()
    return replay.history(timeline[ends[-1] :])


class _Replay:
    """Runs events through an allocator and remembers what is alive."""

    def __init__(self, settings: AllocatorSettings) -> None:
        self._allocator = make_allocator(settings)
        self._blocks: dict[int, Any] = {}
        self._alive: dict[int, LiveTensor] = {}
        self._reserved_bytes = 0

    def run(self, events: Timeline) -> None:
        """Run what comes before the step."""
        for event in events:
            self._run(event)

    def empty_cache(self) -> None:
        """Give back the cached segments."""
        self._allocator.empty_cache()

    def history(self, step: Timeline) -> StepHistory:
        """The step after what was run, with ids as a `StepHistory` has them."""
        resident = list(self._alive.values())
        ids = {id_: index for index, id_ in enumerate(self._alive, start=1)}
        allocated, events = [self._allocator.allocated_bytes], []
        for event in step:
            self._run(event)
            allocated.append(self._allocator.allocated_bytes)
            events.append(_renamed(event, ids, len(resident)))
        return StepHistory(resident, events, allocated, self._reserved_bytes)

    def _run(self, event: Event) -> None:
        allocator = self._allocator
        if isinstance(event, Free):
            allocator.free(self._blocks.pop(event.id))
            del self._alive[event.id]
            return
        before = allocator.allocated_bytes
        self._blocks[event.id] = allocator.alloc(event.bytes, stream=event.stream)
        self._alive[event.id] = LiveTensor(event.name, event.category, allocator.allocated_bytes - before)
        self._reserved_bytes = max(self._reserved_bytes, allocator.reserved_bytes)


def _renamed(event: Event, ids: dict[int, int], num_resident: int) -> Event:
    if isinstance(event, Free):
        return Free(ids.pop(event.id), event.phase)
    # The run's ids grow from event to event, and those before the step are taken by what it left.
    ids[event.id] = id_ = num_resident + event.id
    return msgspec.structs.replace(event, id=id_)
