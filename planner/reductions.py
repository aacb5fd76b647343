"""Global memory that torch's CUDA reductions take beside their output.

A sum, mean, maximum or norm over many elements is split across thread blocks that meet in a buffer in global memory,
with one semaphore for each output block. For means over the rows of a tall matrix the buffer is larger than the matrix
itself, since each thread of a block has its own slot.

Source: torch `aten/src/ATen/native/cuda/Reduce.cuh` (launch configuration); buffers of torch 2.11 on an H200 agree.
"""

from __future__ import annotations

import math

H200_THREADS = 132 * 2048
"""Threads that an H100 or H200 holds at once: taken where no GPU is named; fewer make the buffers smaller."""

_MAX_THREADS = 512
_WARP = 32
_VECTOR = 4  # elements that one load may take
_MIN_VALUES, _MAX_VALUES = 16, 256  # elements that one thread is meant to reduce
_SEMAPHORE_BYTES = 4


def whole_reduction_bytes(
    numel: int, *, element_bytes: int = 4, resident_threads: int = H200_THREADS
) -> tuple[int, int]:
    """Bytes of the buffer and of the semaphores of a reduction of `numel` elements to one, (0, 0) if it needs none.

    Args:
        numel: Elements reduced.
        element_bytes: Bytes of an accumulator: 4 for norms and sums of any float dtype, the element's own size for a
            maximum, 8 for a count.
        resident_threads: Threads that the whole GPU holds at once.
    """
    width = _power_of_two(numel // _VECTOR if numel > 128 else numel, limit=_MAX_THREADS)
    blocks = _blocks_per_output(-(-numel // width), grid=1, target=resident_threads // width)
    return (element_bytes * blocks, _SEMAPHORE_BYTES) if blocks > 1 else (0, 0)


def row_reduction_bytes(
    rows: int, columns: int, *, element_bytes: int = 4, resident_threads: int = H200_THREADS
) -> tuple[int, int]:
    """Bytes of the buffer and of the semaphores of a reduction over the columns of `[rows, columns]`, one result a row.

    Args:
        rows: Results.
        columns: Elements reduced to each of them.
        element_bytes: Bytes of an accumulator, as for the whole; 16 for a maximum with its index.
        resident_threads: Threads that the whole GPU holds at once.

    Returns:
        (0, 0) if no thread block shares its outputs with another, as for all but very long rows.
    """
    if rows <= 1:
        if not rows:
            return (0, 0)
        return whole_reduction_bytes(columns, element_bytes=element_bytes, resident_threads=resident_threads)
    width = min(_power_of_two(columns, limit=_MAX_THREADS), _WARP)
    height = min(_power_of_two(rows, limit=_MAX_THREADS), _MAX_THREADS // width)
    width = _power_of_two(columns, limit=_MAX_THREADS // height)
    values = -(-columns // width)
    if values < min(height * _MIN_VALUES, _MAX_VALUES):
        return (0, 0)
    blocks = _blocks_per_output(-(-values // height), grid=rows, target=resident_threads // (width * height))
    return (element_bytes * rows * blocks, _SEMAPHORE_BYTES * rows) if blocks > 1 else (0, 0)


def column_reduction_bytes(
    rows: int, columns: int, *, matrices: int = 1, element_bytes: int = 4, resident_threads: int = H200_THREADS
) -> tuple[int, int]:
    """Bytes of the buffer and of the semaphores of a reduction over the rows of `[rows, columns]`, one result a column.

    Args:
        rows: Elements reduced to each result.
        columns: Results of one matrix.
        matrices: Matrices that one launch reduces, as in `[matrices, rows, columns]`.
        element_bytes: Bytes of an accumulator: 4, or the element's own size for a maximum.
        resident_threads: Threads that the whole GPU holds at once.

    Returns:
        (0, 0) if no thread block shares its outputs with another.
    """
    vector = math.gcd(columns, _VECTOR)
    max_threads = _MAX_THREADS // vector
    outputs = columns * matrices
    if not outputs:
        return (0, 0)
    outputs_power = _power_of_two(outputs // vector, limit=max_threads)
    width = min(outputs_power, _WARP)
    height = min(_power_of_two(rows, limit=max_threads), max_threads // width)
    width = min(outputs_power, max_threads // height)
    if rows < min(height * _MIN_VALUES, _MAX_VALUES):
        return (0, 0)
    grid = -(-(outputs // vector) // width)
    blocks = _blocks_per_output(-(-rows // height), grid=grid, target=resident_threads // (width * height))
    if blocks == 1:
        return (0, 0)
    return (element_bytes * outputs * blocks * width * vector, _SEMAPHORE_BYTES * grid)


def _blocks_per_output(values: int, *, grid: int, target: int) -> int:
    """Thread blocks that share an output when each of their threads has `values` elements to reduce.

    Args:
        grid: Thread blocks if none share.
        target: Thread blocks that the GPU holds at once.
    """
    if values < _MAX_VALUES or grid > target:
        return 1
    enough = min(-(-target // grid), -(-values // _MIN_VALUES))
    return max(enough, -(-values // _MAX_VALUES))


def _power_of_two(value: int, *, limit: int) -> int:
    """The largest power of two that is at most `value`, or `limit` if that is smaller."""
    return limit if value >= limit else 1 << (max(value, 1).bit_length() - 1)
