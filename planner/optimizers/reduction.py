"""Global memory that torch's CUDA reductions take beside their output.

A sum, mean, maximum or norm over many elements is split across thread blocks that meet in a buffer in global memory,
with one semaphore for each output block. For means over the rows of a tall matrix the buffer is larger than the matrix
itself, since each thread of a block has its own slot.

Source: torch `aten/src/ATen/native/cuda/Reduce.cuh` (launch configuration); buffers of torch 2.11 on an H200 agree.
"""

from __future__ import annotations

import math

from optplan.planner.optimizers.scratch import Scratch
from optplan.planner.tensors import Parameter

MULTIPROCESSORS = 132
"""Streaming multiprocessors assumed: those of an H100 or H200; fewer make the buffers smaller."""

_THREADS_PER_MULTIPROCESSOR = 2048
_MAX_THREADS = 512
_WARP = 32
_VECTOR = 4  # elements that one load may take
_MIN_VALUES, _MAX_VALUES = 16, 256  # elements that one thread is meant to reduce
_SEMAPHORE_BYTES = 4


def whole_reduction_bytes(numel: int) -> tuple[int, int]:
    """Bytes of the buffer and of the semaphores of a reduction of `numel` elements to one, (0, 0) if it needs none.

    Norms and sums of any float dtype accumulate in fp32.
    """
    width = _power_of_two(numel // _VECTOR if numel > 128 else numel, limit=_MAX_THREADS)
    blocks = _blocks_per_output(-(-numel // width), grid=1, threads=width)
    return (4 * blocks, _SEMAPHORE_BYTES) if blocks > 1 else (0, 0)


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
