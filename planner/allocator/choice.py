"""The simulated allocator for given settings: the lean one for torch's own, the full one for any other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from optplan.planner.allocator.caching import CachingAllocator
from optplan.planner.allocator.copies import copy_allocator
from optplan.planner.allocator.device import DeviceAllocator
from optplan.planner.allocator.driver import Driver
from optplan.planner.allocator.settings import AllocatorSettings

Allocator = CachingAllocator | DeviceAllocator


def make_allocator(
    settings: AllocatorSettings,
    *,
    segment_addresses: Literal["ascending", "descending"] = "descending",
    allowed_bytes: int | None = None,
) -> Allocator:
    """An empty allocator on one stream of a device without end.

    Args:
        settings: How it deals out memory.
        segment_addresses: Where the driver puts each new segment relative to the last.
        allowed_bytes: Most bytes of segments that may exist, None for no limit.
    """
    if settings.is_plain and allowed_bytes is None:
        return CachingAllocator(segment_addresses=segment_addresses)
    return DeviceAllocator(settings, allowed_bytes=allowed_bytes, driver=Driver(segment_addresses=segment_addresses))


def copy_of(allocator: Allocator, live: Iterable[Any]) -> tuple[Allocator, dict[Any, Any]]:
    """An allocator in the same state, and the twins in it of the blocks that may still be freed.

    Args:
        allocator: Either kind.
        live: The blocks in use that the copy may free; others stay in use for good.
    """
    return allocator.copy(live) if isinstance(allocator, CachingAllocator) else copy_allocator(allocator, live)
