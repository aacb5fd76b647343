"""The addresses that a recorded driver gave, for the simulated one to give again."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from optplan.planner.allocator import SMALL_SEGMENT
from optplan.planner.allocator_driver import SegmentEvent


class RecordedAddresses:
    """Answers with the addresses of a history's `segment_alloc` and `segment_map` entries, one after the other."""

    def __init__(self, moves: Iterable[SegmentEvent]) -> None:
        self._given = deque(move for move in moves if move.action in ("segment_alloc", "segment_map"))
        self._ranges: dict[int, int] = {}

    def of_segment(self, size: int) -> int | None:
        """The address of the next segment recorded, if it has that size."""
        return next((move.address for move in self._given if move == ("segment_alloc", move.address, size)), None)

    def of_range(self, page: int, span: int) -> int | None:
        """Where the next range begins: at the first mapping, in pages of that size, that lies in no range so far.

        None if there is none: a range made for a request that then failed leaves no trace.
        """
        for action, address, size in self._given:
            fits = size == page if page == SMALL_SEGMENT else size % page == 0
            if (
                action == "segment_map"
                and fits
                and not any(low <= address < high for low, high in self._ranges.items())
            ):
                self.add_range(address, span)
                return address
        return None

    def range_ended(self, start: int) -> None:
        """Let the addresses of a range be given again."""
        self._ranges.pop(start, None)

    def add_range(self, start: int, span: int) -> None:
        """Note a range that exists already."""
        self._ranges[start] = start + span

    def passed(self, move: SegmentEvent) -> None:
        """Forget the address of a recorded move that has been reached."""
        if self._given and self._given[0] == move:
            self._given.popleft()
