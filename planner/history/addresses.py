"""The addresses that a recorded driver gave, for the simulated one to give again."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from optplan.planner.allocator.caching import SMALL_SEGMENT
from optplan.planner.allocator.driver import SegmentEvent
from optplan.planner.history.events import HistoryEvent

GIVEN = ("segment_alloc", "segment_map")
"""Actions by which a driver gives memory."""


class RecordedAddresses:
    """Answers with the addresses of a history's `segment_alloc` and `segment_map` entries, one after the other."""

    def __init__(self, events: Iterable[HistoryEvent], *, once: bool = False) -> None:
        """Begin before the first entry.

        Args:
            once: Give the address of each segment a single time, in place of waiting for `passed`.
        """
        self._once = once
        self._given = deque(event for event in events if event.action in GIVEN)
        self._ranges: dict[int, tuple[int, bool]] = {}

    def of_segment(self, size: int) -> int | None:
        """The address of the next segment recorded, if it has that size."""
        first = self._given[0] if self._given else None
        if first is None or (first.action, first.size) != ("segment_alloc", size):
            return None
        if self._once:
            self._given.popleft()
        return first.address

    def of_range(self, stream: int, small: bool, span: int) -> int | None:
        """Where the next range of a pool begins: at its first mapping that lies in none of its ranges so far.

        None if there is none: a range made for a request that then failed leaves no trace.
        """
        known = [(low, low + span) for low, pool in self._ranges.items() if pool == (stream, small)]
        for event in self._given:
            fits = event.action == "segment_map" and event.stream == stream and (event.size == SMALL_SEGMENT) == small
            if fits and not any(low <= event.address < high for low, high in known):
                self.add_range(event.address, stream, small)
                return event.address
        return None

    def range_ended(self, start: int) -> None:
        """Let the addresses of a range be given again."""
        self._ranges.pop(start, None)

    def add_range(self, start: int, stream: int, small: bool) -> None:
        """Note a range that exists already."""
        self._ranges[start] = (stream, small)

    def passed(self, move: SegmentEvent) -> None:
        """Forget the address of a recorded move that has been reached."""
        if self._given and self._given[0][:3] == move:
            self._given.popleft()

    def forget(self) -> None:
        """Know no more addresses: what is simulated has left what was recorded."""
        self._given.clear()
