"""The driver beneath a simulated allocator: how much memory the device has, and where new memory lies."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

from optplan.planner.allocator.placement import SegmentPlacement
from optplan.planner.units import GIB, MIB, round_up

# Beyond all addresses that real devices use, so that made-up addresses never meet recorded ones.
_TOP = 1 << 60
_RANGES = 1 << 61
_DEFAULT_TOTAL_BYTES = 160 * GIB


class SegmentEvent(NamedTuple):
    """Memory that changed hands between allocator and driver.

    Attributes:
        action: segment_alloc, segment_free, segment_map or segment_unmap.
        address: Where it lies.
        size: Its bytes.
    """

    action: str
    address: int
    size: int


class Addresses(Protocol):
    """Where a driver puts new memory, as far as that is known."""

    def of_segment(self, size: int, /) -> int | None:
        """The address of the next segment, which has `size` bytes."""

    def of_range(self, stream: int, small: bool, span: int, /) -> int | None:
        """The first of the `span` addresses of the next expandable range of a stream's small or large pool."""

    def range_ended(self, start: int, /) -> None:
        """The range that begins at `start` is no more: its addresses may come again."""


class Driver:
    """A device's memory.

    Attributes:
        capacity_bytes: What the device can give; None for no limit.
        total_bytes: The whole device.
        reserved_bytes: What it has given.
        reserved_peak_bytes: The most it has ever given.
        events: What it gave and got back, in order.
    """

    __slots__ = (
        "_addresses", "_ascending", "_next", "_next_range", "_placement", "capacity_bytes", "events",
        "reserved_bytes", "reserved_peak_bytes", "total_bytes",
    )  # fmt: skip

    def __init__(
        self,
        *,
        capacity_bytes: int | None = None,
        total_bytes: int | None = None,
        addresses: Addresses | None = None,
        segment_addresses: Literal["ascending", "descending", "placed"] = "descending",
    ) -> None:
        """Start with nothing given.

        Args:
            total_bytes: The whole device, of which a part may be taken by others; the capacity if left out.
            addresses: Where memory lies. Where they do not know it, and by default, segments lie below all before them,
                as drivers mostly put them.
            segment_addresses: Or above all before them, or placed as by a CUDA driver of which nothing else is asked.
        """
        self.capacity_bytes = capacity_bytes
        self.total_bytes = total_bytes or capacity_bytes or _DEFAULT_TOTAL_BYTES
        self.reserved_bytes = 0
        self.reserved_peak_bytes = 0
        self.events: list[SegmentEvent] = []
        self._addresses = addresses
        self._ascending = segment_addresses == "ascending"
        self._placement = SegmentPlacement() if segment_addresses == "placed" else None
        self._next = _TOP
        self._next_range = _RANGES

    @property
    def span_bytes(self) -> int:
        """Addresses of one expandable range: an eighth more than the device has memory."""
        return self.total_bytes + self.total_bytes // 8

    def segment_address(self, size: int) -> int:
        """Where the next segment lies."""
        address = self._addresses.of_segment(size) if self._addresses is not None else None
        if address is None and self._placement is not None:
            return self._placement.place(round_up(size, 2 * MIB))
        if address is None:
            step = round_up(size, 2 * MIB)
            address = self._next if self._ascending else self._next - step
            self._next += step if self._ascending else -step
        return address

    def range_address(self, stream: int, small: bool, span: int) -> int:
        """Where a new expandable range of `span` bytes begins that is for a stream's small or large pool."""
        address = self._addresses.of_range(stream, small, span) if self._addresses is not None else None
        if address is None:
            address = self._next_range
            self._next_range += span
        return address

    def end_range(self, start: int) -> None:
        """Forget the expandable range that begins at `start`."""
        if self._addresses is not None:
            self._addresses.range_ended(start)

    def can_give(self, size: int) -> bool:
        """Whether the device has that much left."""
        return self.capacity_bytes is None or self.reserved_bytes + size <= self.capacity_bytes

    def give(self, action: str, address: int, size: int) -> None:
        """Hand memory to the allocator."""
        self.reserved_bytes += size
        self.reserved_peak_bytes = max(self.reserved_peak_bytes, self.reserved_bytes)
        self.events.append(SegmentEvent(action, address, size))

    def take_back(self, action: str, address: int, size: int) -> None:
        """Get memory back."""
        self.reserved_bytes -= size
        self.events.append(SegmentEvent(action, address, size))
        if self._placement is not None and action == "segment_free":
            self._placement.give_back(address, round_up(size, 2 * MIB))

    def copy(self) -> Driver:
        """A driver in the same state, its list of events empty."""
        other = Driver(capacity_bytes=self.capacity_bytes, total_bytes=self.total_bytes, addresses=self._addresses)
        other.reserved_bytes, other.reserved_peak_bytes = self.reserved_bytes, self.reserved_peak_bytes
        other._ascending, other._next, other._next_range = self._ascending, self._next, self._next_range
        other._placement = None if self._placement is None else self._placement.copy()
        return other
