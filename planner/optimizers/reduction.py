"""Global memory that torch's CUDA reductions take beside their output.

A sum, mean, maximum or norm over many elements is split across thread blocks that meet in a buffer in global memory,
with one semaphore for each output block. For means over the rows of a tall matrix the buffer is larger than the matrix
itself, since each thread of a block has its own slot.

Source: torch `aten/src/ATen/native/cuda/Reduce.cuh` (launch configuration); buffers of torch 2.11 on an H200 agree.
"""

from __future__ import annotations

import math

from optplan.planner.optimizers.scratch import Part, Scratch
from optplan.planner.tensors import Parameter

MULTIPROCESSORS = 132
"""Streaming multiprocessors assumed: those of an H100 or H200; fewer make the buffers smaller."""

_THREADS_PER_MULTIPROCESSOR = 2048
_MAX_THREADS = 512
_WARP = 32
_VECTOR = 4  # elements that one load may take
_MIN_VALUES, _MAX_VALUES = 16, 256  # elements that one thread is meant to reduce
_SEMAPHORE_BYTES = 4


def whole_reduction_bytes(numel: int, *, element_bytes: int = 4) -> tuple[int, int]:
    """Bytes of the buffer and of the semaphores of a reduction of `numel` elements to one, (0, 0) if it needs none.

    Args:
        numel: Elements reduced.
        element_bytes: Bytes of an accumulator: 4 for norms and sums of any float dtype, the element's own size for a
            maximum, 8 for a count.
    """
    width = _power_of_two(numel // _VECTOR if numel > 128 else numel, limit=_MAX_THREADS)
    blocks = _blocks_per_output(-(-numel // width), grid=1, threads=width)
    return (element_bytes * blocks, _SEMAPHORE_BYTES) if blocks > 1 else (0, 0)


def row_reduction_bytes(rows: int, columns: int, *, element_bytes: int = 4) -> tuple[int, int]:
    """Bytes of the buffer and of the semaphores of a reduction over the columns of `[rows, columns]`, one result a row.

    Args:
        rows: Results.
        columns: Elements reduced to each of them.
        element_bytes: Bytes of an accumulator, as for the whole; 16 for a maximum with its index.

    Returns:
        (0, 0) if no thread block shares its outputs with another, as for all but very long rows.
    """
    if rows <= 1:
        return whole_reduction_bytes(columns, element_bytes=element_bytes) if rows else (0, 0)
    width = min(_power_of_two(columns, limit=_MAX_THREADS), _WARP)
    height = min(_power_of_two(rows, limit=_MAX_THREADS), _MAX_THREADS // width)
    width = _power_of_two(columns, limit=_MAX_THREADS // height)
    values = -(-columns // width)
    if values < min(height * _MIN_VALUES, _MAX_VALUES):
        return (0, 0)
    blocks = _blocks_per_output(-(-values // height), grid=rows, threads=width * height)
    return (element_bytes * rows * blocks, _SEMAPHORE_BYTES * rows) if blocks > 1 else (0, 0)


def column_reduction_bytes(rows: int, columns: int, *, matrices: int = 1, element_bytes: int = 4) -> tuple[int, int]:
    """Bytes of the buffer and of the semaphores of a reduction over the rows of `[rows, columns]`, one result a column.

    Args:
        rows: Elements reduced to each result.
        columns: Results of one matrix.
        matrices: Matrices that one launch reduces, as in `[matrices, rows, columns]`.
        element_bytes: Bytes of an accumulator: 4, or the element's own size for a maximum.

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
    blocks = _blocks_per_output(-(-rows // height), grid=grid, threads=width * height)
    if blocks == 1:
        return (0, 0)
    return (element_bytes * outputs * blocks * width * vector, _SEMAPHORE_BYTES * grid)


def write_whole_reduction(scratch: Scratch, parameter: Parameter, part: Part) -> int:
    """Append a reduction of a whole tensor to one element, such as its norm, and return the id of the result."""
    result = scratch.alloc(parameter, part)
    write_reduction_buffers(scratch, parameter, whole_reduction_bytes(parameter.numel))
    return result


def write_column_reduction(scratch: Scratch, parameter: Parameter, part: Part) -> int:
    """Append a reduction over the last dimension but one, such as the means of columns; return the result's id."""
    result = scratch.alloc(parameter, part)
    rows, columns = parameter.shape[-2:]
    sizes = column_reduction_bytes(rows, columns, matrices=math.prod(parameter.shape[:-2]))
    write_reduction_buffers(scratch, parameter, sizes)
    return result


def write_reduction_buffers(scratch: Scratch, parameter: Parameter, sizes: tuple[int, int]) -> None:
    """Append the buffers of one reduction, if it needs any; its output is the caller's and is allocated first."""
    if any(sizes):
        buffer = scratch.alloc(parameter, ("CUDA reduction buffer", sizes[0]))
        semaphores = scratch.alloc(parameter, ("CUDA reduction semaphores", sizes[1]))
        scratch.free(semaphores, buffer)


def _blocks_per_output(values: int, *, grid: int, threads: int) -> int:
    """Thread blocks that share an output when each of their threads has `values` elements to reduce."""
    target = MULTIPROCESSORS * (_THREADS_PER_MULTIPROCESSOR // threads)
    if values < _MAX_VALUES or grid > target:
        return 1
    enough = min(-(-target // grid), -(-values // _MIN_VALUES))
    return max(enough, -(-values // _MAX_VALUES))


def _power_of_two(value: int, *, limit: int) -> int:
    """The largest power of two that is at most `value`, or `limit` if that is smaller."""
    return limit if value >= limit else 1 << (max(value, 1).bit_length() - 1)
