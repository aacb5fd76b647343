"""Where CUDA's driver puts the segments that it is asked for, relative to each other.

Addresses are reserved in chunks of whole 32 MiB, downwards. A segment goes to the newest chunk with a gap for it, there
to the smallest such gap, at its lower end; without one to a new chunk. A chunk that holds nothing is given up; its
range is used again by smaller chunks alone, at its upper end, as 32 MiB more are searched for so that a chunk can be
aligned. Before the first segment the driver has two gaps in chunks of its own.

Source: addresses recorded on an H200 (driver 580.159.04, CUDA 13.0) in `tests/records/h200_histories/`. In the eight
processes that use one stream, run no kernel and take ordinary segments, all 380 segments lie where this says. It leaves
out what the driver takes for itself when kernels are loaded and streams made, which moves what comes after. Other GPUs
and drivers are assumed to be alike.
"""

from __future__ import annotations

from bisect import insort
from operator import attrgetter

from optplan.planner.units import MIB, round_up

CHUNK = 32 * MIB
"""Chunks are multiples of it and aligned to it."""
CONTEXT_GAPS = ((488 * MIB, 24 * MIB), (414 * MIB, 2 * MIB))
"""Gaps that the context leaves, the older first: where they begin above the top of the first chunk, and their bytes."""

_TOP = 1 << 60
_AGE = attrgetter("number")


class _Chunk:
    """A reserved range of addresses; `number` counts chunks by age, `gaps` are disjoint ranges without a segment."""

    __slots__ = ("gaps", "high", "low", "number")

    def __init__(self, number: int, low: int, high: int) -> None:
        self.number, self.low, self.high = number, low, high
        self.gaps = [(low, high)]

    def gap_for(self, size: int) -> tuple[int, int] | None:
        """The smallest gap of at least `size` bytes, the lowest of equals."""
        return min((gap for gap in self.gaps if gap[1] - gap[0] >= size), key=_size_first, default=None)

    def put(self, gap: tuple[int, int], size: int) -> int:
        """Take the lower end of a gap."""
        self.gaps.remove(gap)
        if gap[0] + size < gap[1]:
            self.gaps.append((gap[0] + size, gap[1]))
        return gap[0]

    def take_out(self, low: int, high: int) -> None:
        """Make the range of a segment a gap, joined with those beside it."""
        self.gaps, (low, high) = _joined(self.gaps, low, high)
        self.gaps.append((low, high))

    @property
    def is_empty(self) -> bool:
        """Whether no segment lies here."""
        return self.gaps == [(self.low, self.high)]


class SegmentPlacement:
    """The addresses of a process's segments as the driver deals them out."""

    __slots__ = ("_bottom", "_chunks", "_context", "_given_up", "_number", "_open")

    def __init__(self) -> None:
        """Start with the context's gaps."""
        self._number = len(CONTEXT_GAPS)
        self._context = [_Chunk(age, _TOP + at, _TOP + at + size) for age, (at, size) in enumerate(CONTEXT_GAPS)]
        self._chunks: list[_Chunk] = []
        self._open = list(self._context)  # those with a gap, by age
        self._bottom = _TOP
        self._given_up: list[tuple[int, int]] = []

    def place(self, size: int) -> int:
        """The address of a new segment of `size` bytes."""
        for chunk in reversed(self._open):
            gap = chunk.gap_for(size)
            if gap is not None:
                break
        else:
            chunk = self._new_chunk(round_up(size, CHUNK))
            gap = chunk.gaps[0]
        address = chunk.put(gap, size)
        if not chunk.gaps:
            self._open.remove(chunk)
        return address

    def give_back(self, address: int, size: int) -> None:
        """Free a segment; one that was not placed here is left alone."""
        both = (*self._chunks, *self._context)
        chunk = next((chunk for chunk in both if chunk.low <= address < chunk.high), None)
        if chunk is None:
            return
        if not chunk.gaps:
            insort(self._open, chunk, key=_AGE)
        chunk.take_out(address, address + size)
        if chunk.is_empty and chunk not in self._context:
            self._give_up(chunk)

    def copy(self) -> SegmentPlacement:
        """A placement in the same state."""
        other = SegmentPlacement()
        other._number, other._bottom, other._given_up = self._number, self._bottom, list(self._given_up)
        twins = {chunk: _copy_of(chunk) for chunk in (*self._context, *self._chunks)}
        other._context = [twins[chunk] for chunk in self._context]
        other._chunks = [twins[chunk] for chunk in self._chunks]
        other._open = [twins[chunk] for chunk in self._open]
        return other

    def _new_chunk(self, size: int) -> _Chunk:
        high = self._range_for(size)
        chunk = _Chunk(self._number, high - size, high)
        self._number += 1
        self._chunks.append(chunk)
        self._open.append(chunk)
        return chunk

    def _range_for(self, size: int) -> int:
        """The upper end of where a new chunk lies, taken out of what was given up or below all."""
        larger = [(low, high) for low, high in self._given_up if high - low > size]
        if not larger:
            self._bottom -= size
            return self._bottom + size
        low, high = max(larger)
        self._given_up.remove((low, high))
        self._given_up.append((low, high - size))
        return high

    def _give_up(self, chunk: _Chunk) -> None:
        self._chunks.remove(chunk)
        self._open.remove(chunk)
        self._given_up, (low, high) = _joined(self._given_up, chunk.low, chunk.high)
        if low == self._bottom:
            self._bottom = high
        else:
            self._given_up.append((low, high))


def _joined(ranges: list[tuple[int, int]], low: int, high: int) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """The ranges that do not touch the given one, and the given one joined with those that do."""
    apart = [(start, end) for start, end in ranges if end != low and start != high]
    touching = [(start, end) for start, end in ranges if end == low or start == high]
    low, high = min([low, *(start for start, _ in touching)]), max([high, *(end for _, end in touching)])
    return apart, (low, high)


def _copy_of(chunk: _Chunk) -> _Chunk:
    twin = _Chunk(chunk.number, chunk.low, chunk.high)
    twin.gaps = list(chunk.gaps)
    return twin


def _size_first(gap: tuple[int, int]) -> tuple[int, int]:
    return gap[1] - gap[0], gap[0]
