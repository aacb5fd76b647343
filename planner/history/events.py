"""A recorded allocator history: what one device's caching allocator did, and what it held at the end."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from optplan.planner.allocator.settings import AllocatorSettings

ACTIONS = (
    "alloc", "free_requested", "free_completed", "segment_alloc", "segment_free", "segment_map", "segment_unmap",
    "snapshot", "oom",
)  # fmt: skip
"""Everything that torch's allocator records (`TraceEntry::Action`)."""


class HistoryEvent(NamedTuple):
    """One entry of a history.

    Attributes:
        action: One of `ACTIONS`.
        address: Where the memory lies; 0 for `oom`.
        size: Bytes requested, or those of the segment; for `oom` the rounded bytes that could not be had.
        stream: The stream it belongs to.
        owner: The private pool it belongs to, (0, 0) for none.
        device_free_bytes: With `oom`, what the driver said was free.
    """

    action: str
    address: int
    size: int
    stream: int
    owner: tuple[int, int]
    device_free_bytes: int


class HeldBlock(NamedTuple):
    """A block in use at the end of a history.

    Attributes:
        address: Where it begins.
        size: Its bytes.
        requested: The bytes asked for.
        waiting: Whether its tensor is gone and only other streams still use it.
    """

    address: int
    size: int
    requested: int
    waiting: bool


class HeldSegment(NamedTuple):
    """A segment, or a stretch of an expandable range with memory behind it, at the end of a history.

    Attributes:
        address: Where it begins.
        size: Its bytes.
        stream: The stream whose requests it serves.
        owner: The private pool it belongs to, (0, 0) for none.
        small: Whether it serves requests up to 1 MiB.
        expandable: Whether it is part of an expandable range.
        allocated: Bytes that tensors hold in it.
        active: Bytes that tensors hold or other streams still use in it.
        blocks: The blocks in use, in order of addresses.
    """

    address: int
    size: int
    stream: int
    owner: tuple[int, int]
    small: bool
    expandable: bool
    allocated: int
    active: int
    blocks: tuple[HeldBlock, ...]


class DeviceHistory(msgspec.Struct, frozen=True):
    """One device's part of a snapshot.

    Attributes:
        source: The file, for people.
        device: The device's index.
        events: What happened, in order.
        segments: What there was at the end.
        settings: The allocator's settings, torch's own where the snapshot does not tell.
        alloc_conf: The text they were given as, None where the snapshot does not tell.
    """

    source: str
    device: int
    events: list[HistoryEvent]
    segments: list[HeldSegment]
    settings: AllocatorSettings
    alloc_conf: str | None
