"""How much memory the recorded allocator could have, as far as its history tells."""

from __future__ import annotations

import msgspec

from optplan.planner.allocator.device import DeviceAllocator
from optplan.planner.history.events import DeviceHistory, HistoryEvent

_GIVEN = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}


class Limits(msgspec.Struct, frozen=True):
    """The least memory with which the history goes as recorded; None for no limit that was ever felt.

    Attributes:
        capacity_bytes: What the device can give.
        allowed_bytes: Most bytes of segments, where a share of the device was set.
        total_bytes: The whole device, None if unknown.
    """

    capacity_bytes: int | None = None
    allowed_bytes: int | None = None
    total_bytes: int | None = None

    def refuse(self, allocator: DeviceAllocator, num_bytes: int) -> bool:
        """Whether a request for which a new segment is needed cannot have one now."""
        settings = allocator.settings
        segment = settings.segment_bytes(settings.rounded(num_bytes))
        reserved = allocator.reserved_bytes
        if self.allowed_bytes is not None and reserved + segment > self.allowed_bytes:
            return True
        # Pages are mapped behind what is free already: whether they are too many shows only when it is done.
        return self.capacity_bytes is not None and (
            settings.expandable_segments or reserved + segment > self.capacity_bytes
        )


def find_limits(history: DeviceHistory, *, start_reserved_bytes: int) -> Limits:
    """The limits that a history shows: by requests that failed, and by memory given back just before it was needed.

    Every amount that was ever reserved was possible. A device that refuses one byte more refuses whatever the real one
    did, because the real one refused at least that much.
    """
    most = reserved = start_reserved_bytes
    pending: list[HistoryEvent] = []
    levels: list[tuple[int, list[HistoryEvent], HistoryEvent]] = []
    before = reserved
    for event in history.events:
        sign = _GIVEN.get(event.action)
        if sign is not None:
            reserved += sign * event.size
            most = max(most, reserved)
            pending.append(event)
        elif event.action in ("alloc", "oom"):
            levels.append((before, pending, event))
            pending, before = [], reserved
        elif event.action == "free_requested":
            pending, before = [], reserved
    failed = [event for _, _, event in levels if event.action == "oom"]
    # Garbage collection gives back too, long before the device is full.
    collects = history.settings.garbage_collection_threshold > 0
    full = bool(failed) or (not collects and any(_was_full(level, moves, most) for level, moves, _ in levels if moves))
    if not full:
        return Limits()
    if history.settings.expandable_segments and failed and _had_room(history, failed):
        most_allowed = max(
            (
                _before_last_map(level, moves) + _segment(history, event)
                for level, moves, event in levels
                if _maps(moves)
            ),
            default=most,
        )
        return Limits(allowed_bytes=most_allowed)
    return Limits(capacity_bytes=most)


def _was_full(before: int, moves: list[HistoryEvent], most: int) -> bool:
    """Whether memory was given back and then more taken than there ever was room for."""
    if not any(_GIVEN[move.action] < 0 for move in moves):
        return False
    return before + sum(move.size for move in moves if _GIVEN[move.action] > 0) > most


def _maps(moves: list[HistoryEvent]) -> bool:
    return any(move.action == "segment_map" for move in moves)


def _before_last_map(before: int, moves: list[HistoryEvent]) -> int:
    """What was reserved when the request that ended with these moves was let through."""
    given_back = sum(move.size for move in moves if _GIVEN[move.action] < 0)
    return before - given_back


def _segment(history: DeviceHistory, event: HistoryEvent) -> int:
    return history.settings.segment_bytes(history.settings.rounded(event.size))


def _had_room(history: DeviceHistory, failed: list[HistoryEvent]) -> bool:
    """Whether the device itself had room for what failed, so that it was a share of it that was full."""
    return all(event.device_free_bytes > 2 * _segment(history, event) for event in failed)
