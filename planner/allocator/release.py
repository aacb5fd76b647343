"""Which cached segments the allocator gives back before it gives up.

Source: pytorch `c10/cuda/CUDACachingAllocator.cpp` (`garbage_collect_cached_blocks`,
`release_available_cached_blocks`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from optplan.planner.allocator.pools import DeviceBlock, DevicePool


def unsplit_blocks(pools: Iterable[DevicePool]) -> list[DeviceBlock]:
    """The cached blocks that are whole segments."""
    return [block for pool in pools for _, _, block in pool.cached if _is_segment(block)]


def too_old(blocks: list[DeviceBlock], excess_bytes: int, *, now: int) -> list[DeviceBlock]:
    """The segments that garbage collection gives back: those of at least the mean age, again until it is enough.

    Args:
        blocks: Cached whole segments.
        excess_bytes: What is reserved beyond the threshold.
        now: The number of searches so far; a block's age is how many of them it has been cached for.
    """
    released: list[DeviceBlock] = []
    remaining, reclaimed = list(blocks), 0
    while remaining and reclaimed < excess_bytes:
        mean_age = sum(now - block.since for block in remaining) / len(remaining)
        old = [block for block in remaining if now - block.since >= mean_age]
        if not old:
            break
        released += old
        reclaimed += sum(block.size for block in old)
        remaining = [block for block in remaining if now - block.since < mean_age]
    return released


def oversize_blocks(pool: DevicePool, wanted_bytes: int, *, limit: int) -> tuple[list[DeviceBlock], bool]:
    """The never-split segments given back to make room, and whether they are enough.

    Args:
        wanted_bytes: The smallest single segment that is enough; without one, smaller ones go, the largest first.
        limit: Size from which on blocks are never split.
    """
    index = bisect_left(pool.cached, (wanted_bytes,))
    if index < len(pool.cached) and _is_segment(pool.cached[index][2]):
        return [pool.cached[index][2]], True
    blocks: list[DeviceBlock] = []
    total = 0
    for size, _, block in reversed(pool.cached[:index]):
        if total >= wanted_bytes or size < limit:
            break
        if _is_segment(block):
            blocks.append(block)
            total += size
    return blocks, total >= wanted_bytes


def _is_segment(block: DeviceBlock) -> bool:
    return block.range_start < 0 and not block.is_split
