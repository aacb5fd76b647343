"""The simulated allocator for given settings: the lean one for torch's own, the full one for any other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from optplan.planner.allocator import CachingAllocator
from optplan.planner.allocator_copy import copy_allocator
from optplan.planner.allocator_device import DeviceAllocator
from optplan.planner.allocator_settings import AllocatorSettings

Allocator = CachingAllocator | DeviceAllocator


def make_allocator(settings: AllocatorSettings) -> Allocator:
    """An empty allocator on one stream of a device without end."""
    return CachingAllocator() if settings.is_plain else DeviceAllocator(settings)


def copy_of(allocator: Allocator, live: Iterable[Any]) -> tuple[Allocator, dict[Any, Any]]:
    """An allocator in the same state, and the twins in it of the blocks that may still be freed.

    Args:
        allocator: Either kind.
        live: The blocks in use that the copy may free; others stay in use for good.
    """
    return allocator.copy(live) if isinstance(allocator, CachingAllocator) else copy_allocator(allocator, live)
