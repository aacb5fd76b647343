"""Running a history through the simulated allocator under the settings it was recorded with, entry by entry.

What a program asks for (allocations, frees) is taken from the history; what the allocator does with it is simulated and
held against the history. Three things can only be taken from the recording: the addresses of new segments, when another
stream has finished with a block, and that somebody called `empty_cache`.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from optplan.planner.allocator.device import DeviceAllocator, OutOfMemory
from optplan.planner.allocator.driver import Driver, SegmentEvent
from optplan.planner.allocator.pools import DeviceBlock
from optplan.planner.allocator.release import unsplit_blocks
from optplan.planner.history.addresses import GIVEN, RecordedAddresses
from optplan.planner.history.events import DeviceHistory, HistoryEvent
from optplan.planner.history.limits import Limits
from optplan.planner.history.load import load_start
from optplan.planner.history.start import StartState

_TAKEN = ("segment_free", "segment_unmap")


class RecordedReplay:
    """A history at work.

    Attributes:
        allocator: The simulated allocator.
        flushes: Indices of the events before which the whole cache was given back on the program's behalf.
        num_allocations: Allocations so far.
        num_equal_addresses: Those at the recorded address.
        num_moves: Recorded segments and pages so far that changed hands.
        num_equal_moves: Those that the simulation made too.
        first_difference: What the first difference was.
    """

    def __init__(self, history: DeviceHistory, start: StartState, limits: Limits) -> None:
        self._history = history
        self._limits = limits
        self._has_streams = len({event.stream for event in history.events if event.action == "alloc"}) > 1
        self._addresses = RecordedAddresses(history.events)
        driver = Driver(capacity_bytes=limits.capacity_bytes, addresses=self._addresses, total_bytes=limits.total_bytes)
        # When garbage is collected depends on a share of the device that no snapshot tells: it is done as recorded.
        settings = msgspec.structs.replace(history.settings, garbage_collection_threshold=0.0)
        self.allocator = DeviceAllocator(settings, allowed_bytes=limits.allowed_bytes, driver=driver)
        self._live = load_start(self.allocator, start, history, self._addresses)
        self._waiting = {
            block.address: self._live.pop(block.address) for block in start.blocks.values() if block.waiting
        }
        self.flushes: list[int] = []
        self.num_allocations = self.num_equal_addresses = self.num_moves = self.num_equal_moves = 0
        self.first_difference: str | None = None

    def run(self) -> None:
        """Run all events."""
        pending: list[HistoryEvent] = []
        requested = -1
        for index, event in enumerate(self._history.events):
            action, address = event.action, event.address
            if action == "alloc" or action == "oom":
                self._serve(index, event, pending)
                pending = []
            elif action == "free_requested":
                if pending:
                    self._settle(index, pending)
                    pending = []
                self._request_free(address)
                requested = address
            elif action == "free_completed" and address == requested and not pending and not self._may_wait(index):
                self.allocator.finish(self._waiting.pop(address, None))
            elif action != "snapshot":
                pending.append(event)
        self._settle(len(self._history.events), pending)

    def _may_wait(self, index: int) -> bool:
        """Whether the end of a block's use may be due to a full device that waits for other streams."""
        events = self._history.events
        return self._has_streams and index + 1 < len(events) and events[index + 1].action in _TAKEN

    def _request_free(self, address: int) -> None:
        block = self._live.pop(address, None)
        if block is not None:
            self.allocator.free_when_done(block)
            self._waiting[address] = block

    def _serve(self, index: int, event: HistoryEvent, pending: list[HistoryEvent]) -> None:
        """Run a request, and before it what the history has between the last entry and its own."""
        if pending and not self._does_itself(event, pending):
            self._apply(index, pending)
        try:
            block = self.allocator.alloc(event.size, stream=event.stream, owner=event.owner)
        except OutOfMemory:
            block = None
        for earlier in pending:
            if earlier.action == "free_completed":
                self._waiting.pop(earlier.address, None)
        if event.action == "alloc":
            self._compare_address(index, event, block)
        elif block is not None:
            self._differ(index, f"a request of {event.size} bytes is served that failed when recorded")
            self.allocator.free(block)
        self._compare_moves(index, pending)

    def _settle(self, index: int, pending: list[HistoryEvent]) -> None:
        if pending:
            self._apply(index, pending)
            self._compare_moves(index, pending)

    def _does_itself(self, event: HistoryEvent, pending: list[HistoryEvent]) -> bool:
        """Whether the allocator, finding the device full, will itself wait for the other streams and give back."""
        if event.action != "oom" and not any(entry.action in _TAKEN for entry in pending):
            return False
        must_grow = self.allocator.must_grow(event.size, stream=event.stream, owner=event.owner)
        return must_grow and self._limits.refuse(self.allocator, event.size)

    def _apply(self, index: int, pending: list[HistoryEvent]) -> None:
        """Do what was done on somebody's behalf: blocks that other streams finish with, memory given back."""
        taken = [entry.address for entry in pending if entry.action in _TAKEN]
        for entry in pending:
            if entry.action == "free_completed":
                self.allocator.finish(self._waiting.pop(entry.address, None))
        if not taken:
            return
        cached = {block.address: block for block in unsplit_blocks(self.allocator.pools())}
        unmaps = any(entry.action == "segment_unmap" for entry in pending)
        if unmaps or (set(taken) == set(cached) and not self._may_collect(cached.values())):
            self.flushes.append(index)
            self.allocator.empty_cache()
            return
        for address in taken:
            if address in cached:
                self.allocator.release(cached[address])

    def _may_collect(self, taken: Iterable[DeviceBlock]) -> bool:
        """Whether it may have been garbage collection that gave these back; it leaves the small pools alone."""
        return self._history.settings.garbage_collection_threshold > 0 and not any(block.pool.small for block in taken)

    def _compare_address(self, index: int, event: HistoryEvent, block: DeviceBlock | None) -> None:
        self.num_allocations += 1
        if block is None:
            self._differ(index, f"a request of {event.size} bytes fails that was served when recorded")
            return
        self._live[event.address] = block
        if block.address == event.address:
            self.num_equal_addresses += 1
        else:
            self._differ(
                index, f"{event.size} bytes are allocated at {block.address:#x}, recorded at {event.address:#x}"
            )

    def _compare_moves(self, index: int, pending: list[HistoryEvent]) -> None:
        made = self.allocator.driver.events
        recorded = moves_of(pending) if pending else []
        if made or recorded:
            self.num_moves += len(recorded)
            self.num_equal_moves += sum(move in made for move in recorded)
            for move in recorded:
                self._addresses.passed(move)
            if made != recorded:
                first = next((pair for pair in zip(made, recorded, strict=False) if pair[0] != pair[1]), None)
                text = f"{_text(first[0])}, recorded {_text(first[1])}" if first else f"{len(made)} moves of memory"
                self._differ(index, text if first else f"{text}, recorded {len(recorded)}")
            made.clear()

    def _differ(self, index: int, what: str) -> None:
        if self.first_difference is None:
            self.first_difference = f"event {index}: {what}"
            self._addresses.forget()


def moves_of(events: list[HistoryEvent]) -> list[SegmentEvent]:
    """The segments and pages that changed hands with the driver."""
    return [SegmentEvent(*event[:3]) for event in events if event.action in GIVEN or event.action in _TAKEN]


def _text(move: SegmentEvent) -> str:
    return f"{move.action} of {move.size} bytes at {move.address:#x}"
