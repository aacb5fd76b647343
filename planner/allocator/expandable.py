"""Expandable segments: a pool's range of addresses, behind which memory is put page by page.

Source: pytorch `c10/cuda/CUDACachingAllocator.cpp` (`find_expandable_block`, `map_block`,
`try_allocate_expandable_block`, `unmap_block`, `release_blocks`).
"""

from __future__ import annotations

from optplan.planner.allocator.caching import SMALL_SEGMENT
from optplan.planner.allocator.driver import Driver
from optplan.planner.allocator.pools import DeviceBlock, DevicePool, absorb
from optplan.planner.units import round_up


class ExpandableRanges:
    """Puts memory behind the addresses of pools and takes it away."""

    __slots__ = ("_driver", "_large_page")

    def __init__(self, driver: Driver, *, large_page_bytes: int) -> None:
        self._driver = driver
        self._large_page = large_page_bytes

    def expand(self, pool: DevicePool, size: int) -> DeviceBlock | None:
        """Map what is missing at the lowest addresses with room for `size` bytes.

        Returns:
            A block of at least `size` bytes, out of the cache; None if the device is full, with what could be mapped
            left in the cache.
        """
        block = self._lowest_room(pool, size)
        if not block.mapped and not self._map(block, min(block.size, size)):
            return None
        while block.size < size:
            upper = block.next
            assert upper is not None
            if not self._map(upper, min(size - block.size, upper.size)):
                return None
            block = upper
        pool.remove(block)
        return block

    def unmap(self, block: DeviceBlock) -> None:
        """Take away the whole pages of a cached block."""
        page, pool, start = self._page(block.pool), block.pool, block.range_start
        low = start + round_up(block.address - start, page)
        high = start + (block.address + block.size - start) // page * page
        if low >= high:
            return
        pool.remove(block)
        if low > block.address:
            lower = DeviceBlock(block.address, low - block.address, pool, start)
            _insert_before(lower, block)
            pool.add(lower)
        if block.address + block.size > high:
            upper = DeviceBlock(high, block.address + block.size - high, pool, start)
            upper.insert_after(block)
            pool.add(upper)
        block.address, block.size, block.mapped = low, high - low, False
        absorb(block, block.previous)
        absorb(block, block.next)
        pool.add_unmapped(block)
        pool.counters.reserved_bytes -= high - low
        self._driver.take_back("segment_unmap", low, high - low)
        if not block.is_split:
            # Nothing of the range is left; the next request makes a new one.
            pool.remove_unmapped(block)
            self._driver.end_range(start)

    def _page(self, pool: DevicePool) -> int:
        return SMALL_SEGMENT if pool.small else self._large_page

    def _lowest_room(self, pool: DevicePool, size: int) -> DeviceBlock:
        """The lowest free block, with memory or without, from which on `size` bytes of addresses are free."""
        for _, unmapped in pool.unmapped:
            below = unmapped.previous
            block = unmapped if below is None or below.in_use else below
            if _has_room(block, size):
                return block
        page = self._page(pool)
        # On a device without end a request may be larger than a real device's range.
        span = round_up(max(self._driver.span_bytes, size), page)
        address = self._driver.range_address(pool.stream, pool.small, span)
        whole = DeviceBlock(address, span, pool, address, mapped=False)
        pool.add_unmapped(whole)
        return whole

    def _map(self, block: DeviceBlock, size: int) -> bool:
        """Put memory behind the first `size` bytes of a block without any, in whole pages; whether there was enough."""
        pool = block.pool
        size = round_up(size, self._page(pool))
        if not self._driver.can_give(size):
            return False
        pool.remove_unmapped(block)
        block.mapped = True
        if size < block.size:
            rest = DeviceBlock(block.address + size, block.size - size, pool, block.range_start, mapped=False)
            rest.insert_after(block)
            pool.add_unmapped(rest)
            block.size = size
        address = block.address
        absorb(block, block.previous)
        absorb(block, block.next)
        pool.add(block)
        pool.counters.reserved_bytes += size
        self._driver.give("segment_map", address, size)
        return True


def room_with_tail(block: DeviceBlock) -> int:
    """Bytes that a cached block can grow to: its own and the addresses without memory above it."""
    above = block.next
    return block.size if above is None or above.mapped else block.size + above.size


def _has_room(block: DeviceBlock | None, size: int) -> bool:
    room = 0
    while room < size and block is not None and not block.in_use:
        room += block.size
        block = block.next
    return room >= size


def _insert_before(lower: DeviceBlock, block: DeviceBlock) -> None:
    lower.previous, lower.next = block.previous, block
    if block.previous is not None:
        block.previous.next = lower
    block.previous = lower
