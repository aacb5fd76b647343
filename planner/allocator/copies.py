"""Copying a simulated allocator, so that several futures start from one past."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from optplan.planner.allocator.device import DeviceAllocator
from optplan.planner.allocator.pools import Counters, DeviceBlock, DevicePool

_COUNTS = (
    "active_peak_bytes", "allocated_peak_bytes", "num_alloc_retries", "num_ooms", "num_searches",
    "requested_peak_bytes",
)  # fmt: skip


def copy_allocator(
    allocator: DeviceAllocator, live: Iterable[DeviceBlock]
) -> tuple[DeviceAllocator, dict[DeviceBlock, DeviceBlock]]:
    """An allocator in the same state, and the twins in it of the blocks that may still be freed.

    Args:
        allocator: The allocator, no block of which waits for other streams.
        live: The blocks in use that the copy may free; others stay in use for good.
    """
    other = DeviceAllocator(allocator.settings, allowed_bytes=allocator.allowed_bytes, driver=allocator.driver.copy())
    for name in _COUNTS:
        setattr(other, name, getattr(allocator, name))
    _copy_counters(allocator.small, other.small)
    _copy_counters(allocator.large, other.large)
    pools = {pool: other.pool(pool.stream, pool.owner, pool.small) for pool in allocator.pools()}
    twins: dict[DeviceBlock, DeviceBlock] = {}
    held = (block for pool in pools for _, _, block in pool.cached)
    for block in chain(live, held, (block for pool in pools for _, block in pool.unmapped)):
        if block not in twins:
            _copy_segment(block, pools, twins)
    for pool, twin in pools.items():
        twin.cached = [(size, address, twins[block]) for size, address, block in pool.cached]
        twin.unmapped = [(address, twins[block]) for address, block in pool.unmapped]
    return other, twins


def _copy_counters(source: Counters, target: Counters) -> None:
    for name in Counters.__slots__:
        setattr(target, name, getattr(source, name))


def _copy_segment(
    block: DeviceBlock, pools: dict[DevicePool, DevicePool], twins: dict[DeviceBlock, DeviceBlock]
) -> None:
    """Add twins of all blocks of the segment or range in which `block` lies."""
    while block.previous is not None:
        block = block.previous
    below: DeviceBlock | None = None
    following: DeviceBlock | None = block
    while following is not None:
        twin = DeviceBlock(
            following.address, following.size, pools[following.pool], following.range_start, following.mapped
        )
        twin.requested, twin.in_use, twin.since = following.requested, following.in_use, following.since
        if below is not None:
            twin.insert_after(below)
        twins[following] = below = twin
        following = following.next
