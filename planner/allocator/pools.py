"""What the full simulator of the caching allocator is made of: blocks, pools of cached blocks, counters."""

from __future__ import annotations

from bisect import bisect_left, insort

import msgspec


class DeviceBlock:
    """A part of a segment or of an expandable range: in use, cached, or (in a range) without memory behind it.

    Attributes:
        address: Where it begins.
        size: Bytes it occupies.
        requested: Bytes asked for by the request that it serves or served.
        pool: The pool it belongs to.
        previous: The neighbour below it in the same segment.
        next: The neighbour above it in the same segment.
        in_use: Whether it is taken: by a tensor, or by work of other streams that has not ended.
        mapped: Whether there is memory behind it; False only within expandable ranges.
        range_start: First address of its expandable range, -1 outside of one.
        since: The pool's count of searches when the block came into the cache.
    """

    __slots__ = (
        "address", "in_use", "mapped", "next", "pool", "previous", "range_start", "requested", "since", "size",
    )  # fmt: skip

    def __init__(self, address: int, size: int, pool: DevicePool, range_start: int = -1, mapped: bool = True) -> None:
        self.address = address
        self.size = size
        self.requested = 0
        self.pool = pool
        self.previous: DeviceBlock | None = None
        self.next: DeviceBlock | None = None
        self.in_use = False
        self.mapped = mapped
        self.range_start = range_start
        self.since = 0

    @property
    def is_split(self) -> bool:
        """Whether its segment holds other blocks too."""
        return self.previous is not None or self.next is not None

    def insert_after(self, lower: DeviceBlock) -> None:
        """Become the neighbour above `lower`."""
        self.previous, self.next = lower, lower.next
        if lower.next is not None:
            lower.next.previous = self
        lower.next = self


class Counters:
    """The counters of `torch.cuda.memory_stats()` for the small or the large pool.

    Attributes:
        allocated_bytes: Sizes of the blocks that tensors hold.
        requested_bytes: What was asked for by the requests behind the active blocks.
        active_bytes: Sizes of the blocks that tensors hold or work of other streams still uses.
        reserved_bytes: Sizes of the segments.
        inactive_split_bytes: Sizes of the cached blocks whose segment is in use elsewhere; not counted in expandable
            ranges.
        num_allocated: Blocks that tensors hold.
        num_active: Active blocks.
        num_segments: Segments; not counted for expandable ranges.
        num_inactive_split: Blocks behind `inactive_split_bytes`.
    """

    __slots__ = (
        "active_bytes", "allocated_bytes", "inactive_split_bytes", "num_active", "num_allocated",
        "num_inactive_split", "num_segments", "requested_bytes", "reserved_bytes",
    )  # fmt: skip

    def __init__(self) -> None:
        self.allocated_bytes = 0
        self.requested_bytes = 0
        self.active_bytes = 0
        self.reserved_bytes = 0
        self.inactive_split_bytes = 0
        self.num_allocated = 0
        self.num_active = 0
        self.num_segments = 0
        self.num_inactive_split = 0


class Statistics(msgspec.Struct, frozen=True):
    """The allocator's counters at one moment, both pools together; the names are those of `Counters`."""

    allocated_bytes: int
    requested_bytes: int
    active_bytes: int
    reserved_bytes: int
    inactive_split_bytes: int
    num_allocated: int
    num_active: int
    num_segments: int
    num_inactive_split: int


class DevicePool:
    """The cached blocks of one stream's small or large pool, smallest first, blocks of equal size by address.

    Attributes:
        stream: The stream whose requests it serves.
        owner: The private pool (of a CUDA graph, say) that it belongs to, (0, 0) for none.
        small: Whether it serves requests up to 1 MiB.
        counters: Counters of all small or all large pools.
        cached: Sizes, addresses and blocks in order.
        unmapped: Addresses and blocks of expandable ranges without memory behind them, in order.
    """

    __slots__ = ("cached", "counters", "owner", "small", "stream", "unmapped")

    def __init__(self, *, stream: int, owner: tuple[int, int], small: bool, counters: Counters) -> None:
        self.stream = stream
        self.owner = owner
        self.small = small
        self.counters = counters
        # No two blocks have one address, so that the blocks themselves are never compared.
        self.cached: list[tuple[int, int, DeviceBlock]] = []
        self.unmapped: list[tuple[int, DeviceBlock]] = []

    def add(self, block: DeviceBlock) -> None:
        """Put a block into the cache."""
        insort(self.cached, (block.size, block.address, block))

    def remove(self, block: DeviceBlock) -> None:
        """Take a cached block out."""
        del self.cached[bisect_left(self.cached, (block.size, block.address))]

    def add_unmapped(self, block: DeviceBlock) -> None:
        """Note a stretch of addresses without memory."""
        insort(self.unmapped, (block.address, block))

    def remove_unmapped(self, block: DeviceBlock) -> None:
        """Forget a stretch of addresses without memory."""
        del self.unmapped[bisect_left(self.unmapped, (block.address,))]


def absorb(block: DeviceBlock, neighbour: DeviceBlock | None) -> int:
    """Let `block` take up a neighbour that is free too and, like it, has memory or has none.

    Returns:
        Bytes taken up, 0 if the neighbour stays.
    """
    if neighbour is None or neighbour.in_use or neighbour.mapped is not block.mapped:
        return 0
    if neighbour.mapped:
        neighbour.pool.remove(neighbour)
    else:
        neighbour.pool.remove_unmapped(neighbour)
    if block.previous is neighbour:
        block.address, block.previous = neighbour.address, neighbour.previous
        if block.previous is not None:
            block.previous.next = block
    else:
        block.next = neighbour.next
        if block.next is not None:
            block.next.previous = block
    block.size += neighbour.size
    return neighbour.size
