"""What a history found when its recording began, worked out backwards from what it left.

A snapshot tells the segments and blocks at the end; undoing the entries from the last to the first leads to those at
the start. Of a block that is there at the start and freed later only the request is known, not its size, which is up to
1 MiB larger in the large pool. Two things tell more. Blocks of that pool are never smaller than 1 MiB, so a smaller gap
above a block belongs to it. And a cached block is used from its low end, so the first allocation in a gap above a block
lies where the block ends. What is left open is whether a gap that stays unused until the block below it ends was the
block's own, which matters to nothing but the allocated bytes.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import pairwise
from typing import NamedTuple

from optplan.planner.allocator.caching import SMALL_LIMIT, SMALL_SEGMENT
from optplan.planner.allocator.settings import AllocatorSettings
from optplan.planner.errors import ConfigError
from optplan.planner.history.events import DeviceHistory, HeldSegment, HistoryEvent

Owner = tuple[int, int]


class StartBlock(NamedTuple):
    """A block in use at the start.

    Attributes:
        address: Where it begins.
        requested: The bytes asked for.
        size: Its bytes; None where only the request is known.
        waiting: Whether its tensor was gone already and only other streams still used it.
    """

    address: int
    requested: int
    size: int | None
    waiting: bool


class StartSegment(NamedTuple):
    """A segment, or a stretch of an expandable range with memory behind it, at the start."""

    address: int
    size: int
    stream: int
    owner: Owner
    small: bool
    expandable: bool


class Part(NamedTuple):
    """A stretch of a segment or range at the start: a block in use, or a cached one, or addresses without memory."""

    address: int
    size: int
    block: StartBlock | None
    mapped: bool = True


class StartState:
    """Segments and blocks at one moment of a history; begins at its end."""

    def __init__(self, history: DeviceHistory) -> None:
        self._source = history.source
        self.blocks = {
            block.address: StartBlock(block.address, block.requested, block.size, block.waiting)
            for segment in history.segments
            for block in segment.blocks
        }
        self._segments = {s.address: StartSegment(*s[:6]) for s in history.segments if not s.expandable}
        self._mapped = [StartSegment(*s[:6]) for s in history.segments if s.expandable]
        self._order = sorted(self._segments)
        self._check_apart(sorted(history.segments))
        # A request maps one page of 2 MiB or a number of large pages; what is unmapped may be any number of either.
        maps = [event for event in history.events if event.action == "segment_map"]
        self._pages = {event.address: event.size == SMALL_SEGMENT for event in maps}
        self._pages |= {stretch.address: stretch.small for stretch in self._mapped}
        self._large_page = history.settings.large_segment_bytes

    @property
    def segments(self) -> list[StartSegment]:
        """All segments and mapped stretches, in order of addresses; stretches that touch are one."""
        stretches: list[StartSegment] = []
        for stretch in sorted(self._mapped):
            last = stretches[-1] if stretches else None
            if last is not None and (last.address + last.size, *last[2:]) == (stretch.address, *stretch[2:]):
                stretches[-1] = last._replace(size=last.size + stretch.size)
            else:
                stretches.append(stretch)
        return sorted([*self._segments.values(), *stretches])

    def learn_sizes(self, history: DeviceHistory) -> None:
        """Take the sizes of blocks from the first allocations above them."""
        in_use, segments = sorted(self.blocks), self.segments
        starts = [segment.address for segment in segments]
        unknown = {address for address, block in self.blocks.items() if block.size is None}
        for action, address, *_ in history.events:
            if not unknown or not segments:
                return
            index = bisect_left(in_use, address)
            if action == "free_completed":
                unknown.discard(address)
                del in_use[index : index + 1]
            elif action == "alloc":
                in_use.insert(index, address)
                below = in_use[index - 1] if index else -1
                if below in unknown:
                    segment = segments[bisect_right(starts, below) - 1]
                    if address < segment.address + segment.size:
                        unknown.remove(below)
                        self._learn(self.blocks[below], address - below, history.settings)

    def _learn(self, block: StartBlock, size: int, settings: AllocatorSettings) -> None:
        rounded = settings.rounded(block.requested)
        if rounded <= size <= rounded + SMALL_LIMIT:
            self.blocks[block.address] = block._replace(size=size)

    @property
    def reserved_bytes(self) -> int:
        """Bytes of all segments."""
        return sum(segment.size for segment in self.segments)

    def _check_apart(self, segments: list[HeldSegment]) -> None:
        for below, above in pairwise(segments):
            if below.address + below.size > above.address:
                raise ConfigError(f"{self._source} contradicts itself: segments overlap at {above.address:#x}")

    def undo(self, event: HistoryEvent) -> None:
        """Go back behind an event.

        Raises:
            ConfigError: The event cannot have led to this state.
        """
        action, address, size = event.action, event.address, event.size
        if action == "alloc":
            self._undo_alloc(event)
        elif action == "free_completed":
            self.blocks[address] = StartBlock(address, size, None, True)
        elif action == "free_requested":
            if address not in self.blocks:
                raise self._contradiction(event)
            self.blocks[address] = self.blocks[address]._replace(waiting=False)
        elif action == "segment_alloc":
            segment = self._segments.pop(address, None)
            if segment is None or segment.size != size:
                raise self._contradiction(event)
            del self._order[bisect_left(self._order, address)]
        elif action == "segment_free":
            self._add(event)
        elif action == "segment_map":
            self._unmap(event)
        elif action == "segment_unmap":
            if any(s.address < address + size and address < s.address + s.size for s in self._mapped):
                raise self._contradiction(event)
            small = self._is_small(event)
            self._mapped.append(StartSegment(address, size, event.stream, event.owner, small, True))

    def _add(self, event: HistoryEvent) -> None:
        """Bring a segment back between its neighbours."""
        address, size = event.address, event.size
        index = bisect_left(self._order, address)
        below = self._segments[self._order[index - 1]] if index else None
        above = self._order[index] if index < len(self._order) else None
        if (below is not None and below.address + below.size > address) or (
            above is not None and above < address + size
        ):
            raise self._contradiction(event)
        self._order.insert(index, address)
        self._segments[address] = StartSegment(address, size, event.stream, event.owner, size == SMALL_SEGMENT, False)

    def _undo_alloc(self, event: HistoryEvent) -> None:
        if self.blocks.pop(event.address, None) is None:
            raise self._contradiction(event)

    def _unmap(self, event: HistoryEvent) -> None:
        """Cut the addresses of a mapping out of the mapped stretches."""
        low, high = event.address, event.address + event.size
        kept, num_cut = [], 0
        for stretch in self._mapped:
            start, end = stretch.address, stretch.address + stretch.size
            num_cut += max(0, min(end, high) - max(start, low))
            if start < min(end, low):
                kept.append(stretch._replace(size=min(end, low) - start))
            if max(start, high) < end:
                kept.append(stretch._replace(address=max(start, high), size=end - max(start, high)))
        if num_cut != event.size:
            raise self._contradiction(event)
        self._mapped = kept

    def _is_small(self, event: HistoryEvent) -> bool:
        """Whether unmapped pages are of a small pool: by their size, or as the pages mapped nearest to them are."""
        if event.size % self._large_page or not self._pages:
            return True
        return self._pages[min(self._pages, key=lambda address: abs(address - event.address))]

    def _contradiction(self, event: HistoryEvent) -> ConfigError:
        return ConfigError(
            f"{self._source} contradicts itself: {event.action} of {event.size} bytes at {event.address:#x} does not"
            " lead to its segments; record all actions and dump the snapshot before the recording is stopped"
        )


def start_state(history: DeviceHistory) -> StartState:
    """The state before a history's first event.

    Raises:
        ConfigError: The history cannot have led to its own segments.
    """
    state = StartState(history)
    for event in reversed(history.events):
        state.undo(event)
    state.learn_sizes(history)
    return state


def parts_of(
    segment: StartSegment, blocks: list[StartBlock], settings: AllocatorSettings, *, source: str
) -> list[Part]:
    """A segment at the start, cut into blocks in use and cached ones.

    Args:
        blocks: All blocks in use, in order of addresses.

    Raises:
        ConfigError: Two blocks overlap.
    """
    parts, position, end = [], segment.address, segment.address + segment.size
    first, last = bisect_left(blocks, (segment.address,)), bisect_left(blocks, (end,))
    for index in range(first, last):
        block = blocks[index]
        room = (blocks[index + 1].address if index + 1 < last else end) - block.address
        size = block.size or _size(segment, settings.rounded(block.requested), room, settings)
        if block.address < position or size > room:
            raise ConfigError(f"{source} contradicts itself: blocks overlap at {block.address:#x} when it begins")
        if block.address > position:
            parts.append(Part(position, block.address - position, None))
        parts.append(Part(block.address, size, block))
        position = block.address + size
    return [*parts, Part(position, end - position, None)] if position < end else parts


def _size(segment: StartSegment, rounded: int, room: int, settings: AllocatorSettings) -> int:
    """Bytes of a block of which only the request is known, `room` bytes below the next one."""
    if segment.small or segment.expandable:
        return rounded
    never_split = settings.max_split_bytes is not None and rounded >= settings.max_split_bytes
    return room if never_split or room - rounded <= SMALL_LIMIT else rounded
