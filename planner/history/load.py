"""Putting an allocator into the state that a history found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from optplan.planner.allocator.caching import SMALL_SEGMENT
from optplan.planner.allocator.device import DeviceAllocator
from optplan.planner.allocator.pools import DeviceBlock, DevicePool
from optplan.planner.errors import ConfigError
from optplan.planner.history.addresses import RecordedAddresses
from optplan.planner.history.events import DeviceHistory, HistoryEvent
from optplan.planner.history.start import Part, StartBlock, StartSegment, StartState, parts_of
from optplan.planner.units import round_up


def load_start(
    allocator: DeviceAllocator, state: StartState, history: DeviceHistory, addresses: RecordedAddresses
) -> dict[int, DeviceBlock]:
    """Fill an empty allocator with the segments and blocks of a history's start.

    Returns:
        The blocks in use by address.

    Raises:
        ConfigError: The blocks do not lie within the segments.
    """
    blocks = sorted(state.blocks.values())
    live: dict[int, DeviceBlock] = {}
    for segment in state.segments:
        if not segment.expandable:
            pool = allocator.pool(segment.stream, segment.owner, segment.small)
            parts = parts_of(segment, blocks, allocator.settings, source=history.source)
            _place(allocator, pool, parts, live)
            pool.counters.num_segments += 1
            allocator.driver.give("segment_alloc", segment.address, segment.size)
            pool.counters.reserved_bytes += segment.size
    for range_ in _ranges(state.segments, history, span=allocator.driver.span_bytes):
        _load_range(allocator, range_, blocks, live, history.source, addresses)
    if len(live) != len(blocks):
        raise ConfigError(f"{history.source} contradicts itself: blocks lie outside of its segments when it begins")
    for block in blocks:
        if block.waiting:
            allocator.free_when_done(live[block.address])
    del allocator.driver.events[:]
    allocator.note_peaks()
    return live


def _ranges(
    segments: Iterable[StartSegment], history: DeviceHistory, *, span: int
) -> list[tuple[int, list[StartSegment]]]:
    """The expandable ranges: where each begins, as far as its mappings tell, and its mapped stretches."""
    stretches = sorted((segment for segment in segments if segment.expandable), key=_pool_key)
    ranges: list[tuple[int, list[StartSegment]]] = []
    for key, found in groupby(stretches, key=_pool_key):
        mapped = [event.address for event in history.events if event.action == "segment_map" and _of_pool(event, key)]
        floor = 0
        for stretch in sorted(found):
            if floor and stretch.address < ranges[-1][0] + span:
                ranges[-1][1].append(stretch)
            else:
                below = [
                    address for address in mapped if max(floor, stretch.address - span) < address < stretch.address
                ]
                ranges.append((min([stretch.address, *below]), [stretch]))
            floor = stretch.address + stretch.size
    return ranges


def _of_pool(event: HistoryEvent, key: tuple[int, tuple[int, int], bool]) -> bool:
    return (event.stream, event.owner, event.size == SMALL_SEGMENT) == key


def _pool_key(segment: StartSegment) -> tuple[int, tuple[int, int], bool]:
    return segment.stream, segment.owner, segment.small


def _load_range(
    allocator: DeviceAllocator,
    range_: tuple[int, list[StartSegment]],
    blocks: list[StartBlock],
    live: dict[int, DeviceBlock],
    source: str,
    addresses: RecordedAddresses,
) -> None:
    start, stretches = range_
    pool = allocator.pool(*_pool_key(stretches[0]))
    page = SMALL_SEGMENT if pool.small else allocator.settings.large_segment_bytes
    span = round_up(allocator.driver.span_bytes, page)
    parts: list[Part] = []
    position = start
    for stretch in [*stretches, StartSegment(start + span, 0, *stretches[0][2:])]:
        if stretch.address > position:
            parts.append(Part(position, stretch.address - position, None, mapped=False))
        parts += parts_of(stretch, blocks, allocator.settings, source=source)
        position = stretch.address + stretch.size
    _place(allocator, pool, parts, live, range_start=start)
    mapped = sum(stretch.size for stretch in stretches)
    pool.counters.reserved_bytes += mapped
    allocator.driver.give("segment_map", start, mapped)
    addresses.add_range(start, pool.stream, pool.small)


def _place(
    allocator: DeviceAllocator,
    pool: DevicePool,
    parts: Sequence[Part],
    live: dict[int, DeviceBlock],
    *,
    range_start: int = -1,
) -> None:
    """Make the blocks of one segment or range, neighbours of each other, and count them."""
    below: DeviceBlock | None = None
    for address, size, held, mapped in parts:
        block = DeviceBlock(address, size, pool, range_start, mapped=mapped)
        if below is not None:
            block.insert_after(below)
        below = block
        if held is not None:
            live[address] = block
            allocator.adopt(block, held.requested)
        elif not mapped:
            pool.add_unmapped(block)
        else:
            pool.add(block)
            if range_start < 0 and len(parts) > 1:
                pool.counters.inactive_split_bytes += size
                pool.counters.num_inactive_split += 1
