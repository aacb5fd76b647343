"""torch's CUDA caching allocator in full: every setting, several streams, a device that can be full.

`CachingAllocator` is the same allocator in its default mode on one stream and a device without end, written for speed.

Source: pytorch `c10/cuda/CUDACachingAllocator.cpp` (`malloc`, `alloc_found_block`, `free`, `free_block`,
`get_free_block`, `alloc_block`), 2.11 to 2.13.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from optplan.planner.allocator.caching import ROUNDING, SMALL_LIMIT
from optplan.planner.allocator.driver import Driver
from optplan.planner.allocator.expandable import ExpandableRanges, room_with_tail
from optplan.planner.allocator.pools import Counters, DeviceBlock, DevicePool, Statistics, absorb
from optplan.planner.allocator.release import oversize_blocks, too_old, unsplit_blocks
from optplan.planner.allocator.settings import AllocatorSettings

NO_OWNER = (0, 0)
"""Owner of the pools that serve everything outside private pools."""

PLAIN = AllocatorSettings()
_NO_LIMIT = 1 << 62


class OutOfMemory(Exception):  # noqa: N818
    """The device cannot serve a request, not even after all cached segments went back to it.

    Attributes:
        requested_bytes: What was asked for.
        allocated_bytes: What tensors held.
        reserved_bytes: What the segments that could not be given back held.
    """

    def __init__(self, requested_bytes: int, *, allocated_bytes: int, reserved_bytes: int) -> None:
        super().__init__(f"out of memory on a request of {requested_bytes} bytes")
        self.requested_bytes = requested_bytes
        self.allocated_bytes = allocated_bytes
        self.reserved_bytes = reserved_bytes


class DeviceAllocator:
    """A simulated device's allocator, empty at first.

    Attributes:
        settings: How it deals out memory.
        driver: The device beneath it.
        allowed_bytes: Most bytes of segments that may exist, None for no limit.
        allocated_peak_bytes: The most bytes that tensors held at once.
        requested_peak_bytes: The most bytes asked for by active blocks at once.
        active_peak_bytes: The most bytes in active blocks at once.
        num_alloc_retries: How often a request was tried again after all cached segments went back.
        num_ooms: How often a request failed.
        num_searches: How often a block was looked for in a large pool, while garbage may be collected.
    """

    __slots__ = (
        "_collects", "_max_split", "_pools", "_ranges", "_rounded", "_waiting", "active_peak_bytes",
        "allocated_peak_bytes", "allowed_bytes", "driver", "large", "num_alloc_retries", "num_ooms", "num_searches",
        "requested_peak_bytes", "settings", "small",
    )  # fmt: skip

    def __init__(
        self, settings: AllocatorSettings = PLAIN, *, allowed_bytes: int | None = None, driver: Driver | None = None
    ) -> None:
        """Start without segments.

        Args:
            allowed_bytes: Most bytes of segments that may exist (`torch.cuda.set_per_process_memory_fraction`); by
                default the settings' share of the driver's capacity, no limit for the whole.
        """
        self.settings = settings
        self.driver = driver or Driver()
        capacity = self.driver.capacity_bytes
        if allowed_bytes is None and settings.memory_fraction < 1 and capacity is not None:
            allowed_bytes = int(settings.memory_fraction * capacity)
        self.allowed_bytes = allowed_bytes
        self._collects = allowed_bytes is not None and settings.garbage_collection_threshold > 0
        self._max_split = settings.max_split_bytes or _NO_LIMIT
        self._rounded = settings.rounded if settings.roundup_power2_divisions else None
        self._ranges = (
            ExpandableRanges(self.driver, large_page_bytes=settings.large_segment_bytes)
            if settings.expandable_segments
            else None
        )
        self.small, self.large = Counters(), Counters()
        self._pools: dict[tuple[int, tuple[int, int], bool], DevicePool] = {}
        self._waiting: dict[DeviceBlock, None] = {}
        self.num_searches = 0
        self.allocated_peak_bytes = self.requested_peak_bytes = self.active_peak_bytes = 0
        self.num_alloc_retries = self.num_ooms = 0

    @property
    def allocated_bytes(self) -> int:
        """Sizes of the blocks that tensors hold."""
        return self.small.allocated_bytes + self.large.allocated_bytes

    @property
    def requested_bytes(self) -> int:
        """What the requests behind the active blocks asked for."""
        return self.small.requested_bytes + self.large.requested_bytes

    @property
    def reserved_bytes(self) -> int:
        """Sizes of the segments."""
        return self.driver.reserved_bytes

    def statistics(self) -> Statistics:
        """All counters now."""
        small, large = self.small, self.large
        return Statistics(
            **{name: getattr(small, name) + getattr(large, name) for name in Statistics.__struct_fields__}
        )

    def alloc(self, num_bytes: int, *, stream: int = 0, owner: tuple[int, int] = NO_OWNER) -> DeviceBlock | None:
        """Serve a request; None for zero bytes, which occupy nothing.

        Raises:
            OutOfMemory: There is no room, not even with all cached segments given back.
        """
        if num_bytes == 0:
            return None
        size = -(-num_bytes // ROUNDING) * ROUNDING if self._rounded is None else self._rounded(num_bytes)
        pool = self._pools.get((stream, owner, size <= SMALL_LIMIT)) or self.pool(stream, owner, size <= SMALL_LIMIT)
        block = self._find(pool, size) or self._obtain(pool, size)
        counters, plain = pool.counters, block.range_start < 0
        was_split, rest = block.previous is not None or block.next is not None, block.size - size
        if (rest > SMALL_LIMIT and size < self._max_split) or (
            rest >= ROUNDING and (pool.small or self._ranges is not None)
        ):
            self._split(block, size)
            if plain:
                counters.inactive_split_bytes += -size if was_split else rest
                counters.num_inactive_split += not was_split
        elif was_split and plain:
            counters.inactive_split_bytes -= block.size
            counters.num_inactive_split -= 1
        self.adopt(block, num_bytes)
        self.note_peaks()
        return block

    def adopt(self, block: DeviceBlock, num_bytes: int) -> None:
        """Count a block as in use for a request of `num_bytes`."""
        counters = block.pool.counters
        block.in_use = True
        block.requested = num_bytes
        counters.allocated_bytes += block.size
        counters.active_bytes += block.size
        counters.requested_bytes += num_bytes
        counters.num_allocated += 1
        counters.num_active += 1

    def free(self, block: DeviceBlock | None) -> None:
        """Return what `alloc` gave; the block joins free neighbours of its segment at once."""
        if block is not None:
            counters = block.pool.counters
            counters.allocated_bytes -= block.size
            counters.num_allocated -= 1
            self._finish(block)

    def free_when_done(self, block: DeviceBlock | None) -> None:
        """Return what `alloc` gave while other streams still use it: it stays active until `finish`."""
        if block is not None:
            counters = block.pool.counters
            counters.allocated_bytes -= block.size
            counters.num_allocated -= 1
            self._waiting[block] = None

    def finish(self, block: DeviceBlock | None) -> None:
        """End the other streams' use of a block; nothing if it has ended already."""
        if block is not None and block in self._waiting:
            del self._waiting[block]
            self._finish(block)

    def empty_cache(self) -> None:
        """Give the driver back every cached segment no part of which is in use, once other streams have finished."""
        for block in list(self._waiting):
            self.finish(block)
        for small in (False, True):
            for pool in self._pools_in_order(small):
                for block in [block for _, _, block in pool.cached]:
                    if block.range_start >= 0 and self._ranges is not None:
                        self._ranges.unmap(block)
                    elif not block.is_split:
                        self.release(block)

    def release(self, block: DeviceBlock) -> None:
        """Give the driver back one cached segment."""
        pool = block.pool
        pool.remove(block)
        pool.counters.reserved_bytes -= block.size
        pool.counters.num_segments -= 1
        self.driver.take_back("segment_free", block.address, block.size)

    def pool(self, stream: int, owner: tuple[int, int], small: bool) -> DevicePool:
        """The pool of a stream, made when it is first asked for."""
        key = (stream, owner, small)
        if key not in self._pools:
            counters = self.small if small else self.large
            self._pools[key] = DevicePool(stream=stream, owner=owner, small=small, counters=counters)
        return self._pools[key]

    def pools(self) -> Iterable[DevicePool]:
        """All pools there are."""
        return self._pools.values()

    def _pools_in_order(self, small: bool) -> list[DevicePool]:
        found = [pool for pool in self._pools.values() if pool.small is small and pool.owner == NO_OWNER]
        return sorted(found, key=lambda pool: pool.stream)

    def note_peaks(self) -> None:
        """Take the counters' values into their peaks."""
        small, large = self.small, self.large
        allocated = small.allocated_bytes + large.allocated_bytes
        if allocated > self.allocated_peak_bytes:
            self.allocated_peak_bytes = allocated
        active = small.active_bytes + large.active_bytes
        if active > self.active_peak_bytes:
            self.active_peak_bytes = active
        requested = small.requested_bytes + large.requested_bytes
        if requested > self.requested_peak_bytes:
            self.requested_peak_bytes = requested

    def must_grow(self, num_bytes: int, *, stream: int = 0, owner: tuple[int, int] = NO_OWNER) -> bool:
        """Whether no cached block may serve a request."""
        size = self.settings.rounded(num_bytes)
        pool = self.pool(stream, owner, size <= SMALL_LIMIT)
        return self._best(pool, size) is None

    def _find(self, pool: DevicePool, size: int) -> DeviceBlock | None:
        """Take the best cached block for a request out of the pool; None if none may serve it."""
        if self._collects and not pool.small:
            self.num_searches += 1
        index = self._best(pool, size)
        return None if index is None else pool.cached.pop(index)[2]

    def _best(self, pool: DevicePool, size: int) -> int | None:
        cached = pool.cached
        index = bisect_left(cached, (size,))
        if index == len(cached):
            return None
        if self._ranges is not None:
            # The block at the end of what is mapped can grow: others are preferred to it.
            while index + 1 < len(cached) and room_with_tail(cached[index + 1][2]) < room_with_tail(cached[index][2]):
                index += 1
        found, limit = cached[index][0], self._max_split
        if found >= limit and (size < limit or found >= size + self.settings.max_non_split_rounding_bytes):
            return None
        return index

    def _obtain(self, pool: DevicePool, size: int) -> DeviceBlock:
        """New memory for a request, at need after giving back what is cached."""
        if self._collects:
            self._collect_garbage()
        block = self._grow(pool, size)
        if block is None and self._max_split != _NO_LIMIT and self._release_oversize(pool, size):
            block = self._grow(pool, size)
        if block is None:
            self.empty_cache()
            self.num_alloc_retries += 1
            block = self._grow(pool, size)
        if block is None:
            self.num_ooms += 1
            raise OutOfMemory(size, allocated_bytes=self.allocated_bytes, reserved_bytes=self.reserved_bytes)
        return block

    def _grow(self, pool: DevicePool, size: int) -> DeviceBlock | None:
        segment = self.settings.segment_bytes(size)
        if self.allowed_bytes is not None and self.driver.reserved_bytes + segment > self.allowed_bytes:
            return None
        if self._ranges is not None:
            return self._ranges.expand(pool, size)
        if not self.driver.can_give(segment):
            return None
        block = DeviceBlock(self.driver.segment_address(segment), segment, pool)
        pool.counters.reserved_bytes += segment
        pool.counters.num_segments += 1
        self.driver.give("segment_alloc", block.address, segment)
        return block

    def _collect_garbage(self) -> None:
        assert self.allowed_bytes is not None
        excess = self.driver.reserved_bytes - int(self.settings.garbage_collection_threshold * self.allowed_bytes)
        if excess > 0:
            for block in too_old(unsplit_blocks(self._pools_in_order(False)), excess, now=self.num_searches):
                self.release(block)

    def _release_oversize(self, pool: DevicePool, size: int) -> bool:
        blocks, enough = oversize_blocks(pool, max(size, self._max_split), limit=self._max_split)
        for block in blocks:
            self.release(block)
        return enough

    def _split(self, block: DeviceBlock, size: int) -> None:
        """Cut `block` to `size` and put the rest, which lies above it, into the cache."""
        rest = DeviceBlock(block.address + size, block.size - size, block.pool, block.range_start)
        rest.insert_after(block)
        rest.since = self.num_searches
        block.size = size
        block.pool.add(rest)

    def _finish(self, block: DeviceBlock) -> None:
        """Put a block that nothing uses any more into the cache, joined with its free neighbours."""
        pool, size = block.pool, block.size
        counters = pool.counters
        counters.active_bytes -= size
        counters.requested_bytes -= block.requested
        counters.num_active -= 1
        block.in_use = False
        below, above = absorb(block, block.previous), absorb(block, block.next)
        block.since = self.num_searches
        pool.add(block)
        if block.range_start < 0:
            is_split = block.previous is not None or block.next is not None
            counters.inactive_split_bytes += (block.size if is_split else 0) - below - above
            counters.num_inactive_split += is_split - (below > 0) - (above > 0)
