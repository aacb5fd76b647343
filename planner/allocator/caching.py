"""torch's CUDA caching allocator in its default mode: which bytes a sequence of requests occupies.

Every request is rounded to 512 bytes and served from a cached block of its pool (requests up to 1 MiB have a pool of
their own, and every stream has its two), or else from a new segment, a region obtained from the driver. A block larger
than its request gives the rest back only when that rest is worth keeping; otherwise the whole block counts as
allocated. So allocated bytes exceed the sum of the rounded requests, by up to 1 MiB for every large block.

Source: pytorch `c10/cuda/CUDACachingAllocator.cpp` (`malloc`, `get_free_block`, `should_split`, `get_allocation_size`,
`free_block`) and `c10/core/AllocatorConfig.h` (the constants).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import Literal

from optplan.planner.units import MIB, round_up

ROUNDING = 512
"""Every request is rounded up to a multiple of this many bytes."""
SMALL_LIMIT = MIB
"""Largest rounded request served by the small pool; also the largest rest that a large block keeps."""
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
OWN_SEGMENT_LIMIT = 10 * MIB
"""Requests of at least this size get a segment of their own, rounded up to 2 MiB."""
SEGMENT_ROUNDING = 2 * MIB

_ADDRESS_SPACE = 1 << 47


class Block:
    """A part of a segment, in use or cached.

    Attributes:
        address: Where it begins; only its order among other blocks matters.
        size: Bytes it occupies, counted as allocated while in use.
        requested: Bytes asked for by the request that it serves, 0 while cached.
        pool: The pool it belongs to for as long as its segment exists.
        previous: The neighbour below it in the same segment.
        next: The neighbour above it in the same segment.
        in_use: Whether it serves a request.
    """

    __slots__ = ("address", "in_use", "next", "pool", "previous", "requested", "size")

    def __init__(self, address: int, size: int, pool: Pool) -> None:
        self.address = address
        self.size = size
        self.requested = 0
        self.pool = pool
        self.previous: Block | None = None
        self.next: Block | None = None
        self.in_use = False


class Pool:
    """The cached blocks of one pool.

    Attributes:
        cached: Size, address and block, smallest first, blocks of equal size by address. No two blocks have one
            address, so that the blocks themselves are never compared.
        smallest_rest: What a block must have left for its rest to be cut off.
    """

    __slots__ = ("cached", "smallest_rest")

    def __init__(self, *, smallest_rest: int) -> None:
        self.smallest_rest = smallest_rest
        self.cached: list[tuple[int, int, Block]] = []

    def remove(self, block: Block) -> None:
        """Take a cached block out."""
        del self.cached[bisect_left(self.cached, (block.size, block.address))]

    def blocks(self) -> Iterable[Block]:
        """The cached blocks."""
        return (block for _, _, block in self.cached)

    def copy_into(self, other: Pool, twins: dict[Block, Block]) -> None:
        """Fill an empty pool with the twins of the cached blocks."""
        other.cached = [(size, address, twins[block]) for size, address, block in self.cached]


class CachingAllocator:
    """A simulated device's allocator, empty at first, with memory without end.

    Attributes:
        allocated_bytes: Sizes of the blocks in use.
        reserved_bytes: Sizes of the segments.
        requested_bytes: What the requests behind the blocks in use asked for.
    """

    __slots__ = (
        "_descending", "_extent", "_large", "_of_streams", "_small", "allocated_bytes", "requested_bytes",
        "reserved_bytes",
    )  # fmt: skip

    def __init__(self, *, segment_addresses: Literal["ascending", "descending"] = "descending") -> None:
        """Start without segments.

        Args:
            segment_addresses: Where the driver puts each new segment relative to the last. It decides only between
                cached blocks of equal size; descending is what drivers mostly do.
        """
        self.allocated_bytes = 0
        self.reserved_bytes = 0
        self.requested_bytes = 0
        self._extent = 0  # bytes of address space used so far: a segment given back leaves a hole
        self._small = Pool(smallest_rest=ROUNDING)
        self._large = Pool(smallest_rest=SMALL_LIMIT + 1)
        self._of_streams: dict[tuple[int, bool], Pool] = {}
        self._descending = segment_addresses == "descending"

    def alloc(self, num_bytes: int, *, stream: int = 0) -> Block | None:
        """Serve a request of `num_bytes` on a stream; None for zero bytes, which occupy nothing."""
        if num_bytes == 0:
            return None
        size = -(-num_bytes // ROUNDING) * ROUNDING
        pool = self._small if size <= SMALL_LIMIT else self._large
        if stream:
            pool = self._pool_of(stream, size <= SMALL_LIMIT)
        # The smallest cached block that is large enough, the lowest of equals. Steps are simulated here event by event:
        # what a helper of each line would cost is most of the time.
        cached = pool.cached
        index = bisect_left(cached, (size,))
        block = cached.pop(index)[2] if index < len(cached) else self._new_segment(size, pool)
        if block.size - size >= pool.smallest_rest:
            _split(block, size)
        block.in_use = True
        block.requested = num_bytes
        self.allocated_bytes += block.size
        self.requested_bytes += num_bytes
        return block

    def free(self, block: Block | None) -> None:
        """Return what `alloc` gave; the block joins free neighbours of its segment at once."""
        if block is None:
            return
        self.allocated_bytes -= block.size
        self.requested_bytes -= block.requested
        block.in_use = False
        block.requested = 0
        cached, lower, upper = block.pool.cached, block.previous, block.next
        if lower is not None and not lower.in_use:
            del cached[bisect_left(cached, (lower.size, lower.address))]
            block = _join(lower, block)
        if upper is not None and not upper.in_use:
            del cached[bisect_left(cached, (upper.size, upper.address))]
            block = _join(block, upper)
        insort(cached, (block.size, block.address, block))

    def empty_cache(self) -> None:
        """Give the segments that hold nothing back to the driver, as `torch.cuda.empty_cache` does."""
        for pool in self._pools():
            for block in list(pool.blocks()):
                if block.previous is None and block.next is None:
                    pool.remove(block)
                    self.reserved_bytes -= block.size

    def copy(self, live: Iterable[Block]) -> tuple[CachingAllocator, dict[Block, Block]]:
        """An allocator in the same state, and the twins in it of the blocks that may still be freed.

        Args:
            live: The blocks in use that the copy may free; others stay in use for good.
        """
        other = CachingAllocator(segment_addresses="descending" if self._descending else "ascending")
        other.allocated_bytes = self.allocated_bytes
        other.reserved_bytes = self.reserved_bytes
        other.requested_bytes = self.requested_bytes
        other._extent = self._extent
        pools = {self._small: other._small, self._large: other._large}
        pools |= {pool: other._pool_of(*key) for key, pool in self._of_streams.items()}
        twins: dict[Block, Block] = {}
        for block in (*live, *(block for pool in pools for block in pool.blocks())):
            if block not in twins:
                _copy_segment(block, pools, twins)
        for pool, twin in pools.items():
            pool.copy_into(twin, twins)
        return other, twins

    def _pools(self) -> Iterable[Pool]:
        return (self._small, self._large, *self._of_streams.values())

    def _pool_of(self, stream: int, small: bool) -> Pool:
        """A pool of another stream than the first, made when it is asked for."""
        if (stream, small) not in self._of_streams:
            smallest_rest = ROUNDING if small else SMALL_LIMIT + 1
            self._of_streams[stream, small] = Pool(smallest_rest=smallest_rest)
        return self._of_streams[stream, small]

    def _new_segment(self, size: int, pool: Pool) -> Block:
        segment_size = segment_bytes(size)
        address = _ADDRESS_SPACE - self._extent - segment_size if self._descending else self._extent
        self._extent += segment_size
        self.reserved_bytes += segment_size
        return Block(address, segment_size, pool)


def segment_bytes(size: int) -> int:
    """Bytes of the segment that is made for a rounded request of `size` bytes when no cached block fits."""
    if size <= SMALL_LIMIT:
        return SMALL_SEGMENT
    if size < OWN_SEGMENT_LIMIT:
        return LARGE_SEGMENT
    return round_up(size, SEGMENT_ROUNDING)


def _copy_segment(block: Block, pools: dict[Pool, Pool], twins: dict[Block, Block]) -> None:
    """Add twins of all blocks of the segment in which `block` lies."""
    while block.previous is not None:
        block = block.previous
    below: Block | None = None
    following: Block | None = block
    while following is not None:
        twin = Block(following.address, following.size, pools[following.pool])
        twin.requested, twin.in_use, twin.previous = following.requested, following.in_use, below
        if below is not None:
            below.next = twin
        twins[following] = below = twin
        following = following.next


def _split(block: Block, size: int) -> None:
    """Cut `block` to `size` and put the rest, which lies above it, into the cache."""
    rest = Block(block.address + size, block.size - size, block.pool)
    above = block.next
    rest.previous, rest.next = block, above
    if above is not None:
        above.previous = rest
    block.next, block.size = rest, size
    insort(block.pool.cached, (rest.size, rest.address, rest))


def _join(lower: Block, upper: Block) -> Block:
    """Make one block of two neighbours."""
    lower.size += upper.size
    lower.next = upper.next
    if upper.next is not None:
        upper.next.previous = lower
    return lower
