"""The allocator's own record of what happens on one device: switched on, read, switched off.

Source: torch `torch/cuda/memory.py` (`_record_memory_history`, `_snapshot`) and `c10/cuda/CUDACachingAllocator.cpp`
(`allocation` counts requests served and given back; `free_requested` is noted once for each that is given back).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from optplan.planner.history.events import DeviceHistory, HistoryEvent
from optplan.planner.history.limits import Limits, find_limits
from optplan.planner.history.reader import parse_history
from optplan.planner.history.recorded import RecordedReplay
from optplan.planner.history.start import StartState, start_state
from optplan.profilers.live.live_history import StartingBlock

MAX_ENTRIES = 2_000_000
_COUNTED = ("alloc", "free_requested")


class ReplayedRecord(NamedTuple):
    """A record's allocations and requested frees with what was allocated after each.

    Attributes:
        events: Those entries, nothing else.
        allocated: Allocated bytes before the first and after each.
        start: Blocks in use before the first.
        reserved_bytes: Most bytes held from the driver.
        peak_requested_bytes: Most bytes asked for at once; like `allocated` without blocks that only streams still use.
        first_difference: Where the replay of the record leaves the record, None if nowhere.
        failed_request_bytes: What the last request asked for that could not be served, None if all were.
    """

    events: list[HistoryEvent]
    allocated: list[int]
    start: list[StartingBlock]
    reserved_bytes: int
    peak_requested_bytes: int
    first_difference: str | None
    failed_request_bytes: int | None


class AllocatorRecord:
    """Records what one device's allocator does, from `start` to `stop`."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._before = 0

    def start(self) -> None:
        """Begin a new record."""
        torch.cuda.memory._record_memory_history(None, device=self._device)
        torch.cuda.memory._record_memory_history(
            "all", context=None, stacks="python", max_entries=MAX_ENTRIES, device=self._device
        )
        self._before = self._count()

    def count(self) -> int:
        """Allocations and requested frees since the beginning."""
        return self._count() - self._before

    def stop(self) -> DeviceHistory:
        """End the record and return it."""
        snapshot = torch.cuda.memory._snapshot(self._device)
        torch.cuda.memory._record_memory_history(None, device=self._device)
        return parse_history(snapshot, where="the record of this step", device=self._device)

    def _count(self) -> int:
        counts: dict[str, Any] = torch._C._cuda_memoryStats(self._device)["allocation"]["all"]
        return int(counts["allocated"]) + int(counts["freed"])


def replay_record(history: DeviceHistory) -> ReplayedRecord:
    """Follow a record through the simulated allocator, which knows what each request occupies."""
    start = start_state(history)
    limits = find_limits(history, start_reserved_bytes=start.reserved_bytes)
    replay = _CountingReplay(history, start, limits)
    blocks = [StartingBlock(address, size) for address, size in replay.starting]
    replay.run()
    failed = [event.size for event in history.events if event.action == "oom"]
    return ReplayedRecord(
        [event for event in history.events if event.action in _COUNTED],
        replay.allocated,
        blocks,
        replay.most_reserved,
        replay.peak_requested,
        replay.first_difference,
        failed[-1] if failed else None,
    )


class _CountingReplay(RecordedReplay):
    """A replay that notes what is allocated after each request and each free."""

    def __init__(self, history: DeviceHistory, start: StartState, limits: Limits) -> None:
        super().__init__(history, start, limits)
        self._sizes = {block.address: block.requested for block in start.blocks.values() if not block.waiting}
        self._requested = sum(self._sizes.values())
        self.peak_requested = self._requested
        self.allocated = [self.allocator.allocated_bytes]
        held = [*self._live.items(), *self._waiting.items()]
        self.most_reserved = self.allocator.reserved_bytes
        self.starting = sorted((address, block.size) for address, block in held)

    def _request_free(self, address: int) -> None:
        super()._request_free(address)
        self._requested -= self._sizes.pop(address, 0)
        self.allocated.append(self.allocator.allocated_bytes)

    def _serve(self, index: int, event: HistoryEvent, pending: list[HistoryEvent]) -> None:
        super()._serve(index, event, pending)
        self.most_reserved = max(self.most_reserved, self.allocator.reserved_bytes)
        if event.action == "alloc":
            self._sizes[event.address] = event.size
            self._requested += event.size
            self.peak_requested = max(self.peak_requested, self._requested)
            self.allocated.append(self.allocator.allocated_bytes)
