"""Global memory that torch's CUDA sorts and top-k selections take beside their output.

Sources: torch `aten/src/ATen/native/cuda/TensorTopK.cu` (when a selection spreads over thread blocks, and how many);
buffers of torch 2.11 (CUDA 13) on an H200 agree.
"""

from __future__ import annotations

from optplan.planner.optimizers.scratch import Scratch
from optplan.planner.tensors import Parameter
from optplan.planner.units import round_up

_SHARED_FROM = ((20, 20_000), (40, 10_000), (80, 8_000), (199, 5_000), (799, 3_000), (4_000, 800))
"""Up to so many slices, a slice of so many elements or more is shared by several thread blocks."""

_SHARED_BEYOND = 400  # with more slices than in the table

_MULTIPROCESSORS = 132  # those of an H100 or H200; fewer make the buffers smaller
_THREADS = 256
_BLOCKS_PER_MULTIPROCESSOR = 6
_MIN_ITEMS, _MAX_ITEMS = 4, 64  # elements of one thread
_DIGITS = 256
_COUNT_BYTES, _DIGIT_COUNT_BYTES, _SLICE_BYTES, _INDEX_BYTES = 4, 2, 8, 8
_SCAN_BYTES = 1279  # of a prefix sum over up to some 30,000 blocks

_SMALL_SORT_NUMEL = 4096
_SORT_TILE_NUMEL = {2: 5760, 4: 5376}  # by bytes of an element
_SORT_PASS_BYTES, _SORT_TILE_BYTES, _SORT_COUNTER_BYTES = 2048, 1024, 256
_ALIGNMENT = 256


def write_topk_buffers(
    scratch: Scratch, parameter: Parameter, *, slices: int, slice_numel: int, element_bytes: int
) -> None:
    """Append the buffers of a top-k selection of each row of `[slices, slice_numel]`, if it needs any.

    Its outputs are the caller's and are allocated first.
    """
    if not _is_shared(slices, slice_numel):
        return
    items = -(-slices * slice_numel // (_MULTIPROCESSORS * _BLOCKS_PER_MULTIPROCESSOR * _THREADS))
    block_numel = max(_MIN_ITEMS, min(items, _MAX_ITEMS)) * _THREADS
    blocks = slices * -(-slice_numel // block_numel)
    buffers = [
        ("values", slices * element_bytes),
        ("semaphores", slices * _SLICE_BYTES),
        ("ranks", slices * _SLICE_BYTES),
        ("digits of the blocks", blocks * _DIGITS * _DIGIT_COUNT_BYTES),
        ("digits", slices * _DIGITS * _COUNT_BYTES),
        ("elements above", blocks * _COUNT_BYTES),
        ("elements at", blocks * _COUNT_BYTES),
    ]
    ids = [scratch.alloc(parameter, (f"CUDA top-k {what}", size)) for what, size in buffers]
    for _ in range(2):
        scratch.passing(parameter, ("CUDA top-k prefix sum", _SCAN_BYTES))
    scratch.free(*reversed(ids))


def _is_shared(slices: int, slice_numel: int) -> bool:
    least = next((numel for most, numel in _SHARED_FROM if slices <= most), _SHARED_BEYOND)
    return slice_numel >= least


def write_sort_buffers(scratch: Scratch, parameter: Parameter, *, numel: int, element_bytes: int) -> None:
    """Append the buffers of a sort of `numel` elements with their order; its outputs are the caller's."""
    indices = scratch.alloc(parameter, ("CUDA sort indices", numel * _INDEX_BYTES))
    if numel > _SMALL_SORT_NUMEL:
        scratch.passing(parameter, ("CUDA sort workspace", sort_workspace_bytes(numel, element_bytes=element_bytes)))
    scratch.free(indices)


def sort_workspace_bytes(numel: int, *, element_bytes: int) -> int:
    """Workspace of a radix sort of more than 4096 elements with int64 indices: second copies, counts of digits.

    Args:
        numel: Elements sorted.
        element_bytes: Bytes of one of them, 2 or 4: one pass a byte.
    """
    copies = sum(round_up(numel * width, _ALIGNMENT) for width in (element_bytes, _INDEX_BYTES))
    num_tiles = -(-numel // _SORT_TILE_NUMEL[element_bytes])
    counts = element_bytes * _SORT_PASS_BYTES + num_tiles * _SORT_TILE_BYTES + _SORT_COUNTER_BYTES
    return copies + counts + _ALIGNMENT - 1
