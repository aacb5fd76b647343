"""What Adapprox's fast mode allocates in plain torch for matrices of which a rank holds some rows.

All matrices of one rank of factors go through each stage together, because each stage ends in one collective. What
CUDA's Cholesky factorization takes as scratch is not known and left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from optplan.planner.optimizers.adapprox_chunks import chunk_rows, write_chunk
from optplan.planner.optimizers.adapprox_layout import MatrixLayout
from optplan.planner.optimizers.scratch import Scratch

_FP32_BYTES = 4
_WHO = "all matrices"


def write_rows_step(scratch: Scratch, layouts: Sequence[MatrixLayout], *, converted: bool) -> None:
    """Append one step.

    Args:
        scratch: Where to write.
        layouts: This rank's rows of each matrix, perhaps none; all of one rank of factors.
        converted: Whether gradients are not fp32 and chunks of them are copied to it.
    """
    sketches = []
    for layout in layouts:
        start = scratch.alloc(_WHO, ("start of a sketch", _wide_bytes(layout) if layout.rows else 0))
        sketches.append(scratch.alloc(_WHO, ("sketch", _tall_bytes(layout))))
        write_chunk(scratch, _WHO, _chunk_bytes(layout), converted=converted)
        scratch.free(start)
    bases, sums = _write_orthonormal(scratch, layouts)
    scratch.free(*sketches)
    partial = []
    for layout in layouts:
        partial.append(scratch.alloc(_WHO, ("new U", _wide_bytes(layout))))
        write_chunk(scratch, _WHO, _chunk_bytes(layout), converted=converted)
    total = scratch.alloc(_WHO, ("new U of all ranks", sum(map(_wide_bytes, layouts))))
    scratch.free(total, *partial, *bases, sums)


def _write_orthonormal(scratch: Scratch, layouts: Sequence[MatrixLayout]) -> tuple[list[int], int]:
    """Cholesky-QR of all sketches, twice: the ids of the bases, and of the sums over the ranks."""
    square = layouts[0].rank ** 2 * _FP32_BYTES
    scaled = _alloc_all(scratch, "scaled sketch", layouts)
    sums = _write_grams(scratch, len(layouts), square, more=len(layouts) * _FP32_BYTES)
    unit = _alloc_all(scratch, "sketch of unit columns", layouts)
    scratch.free(*scaled)
    grams = [scratch.alloc(_WHO, ("Gram matrix of unit columns", square)) for _ in layouts]
    once = _write_division(scratch, layouts, square)
    scratch.free(*unit)
    second = _write_grams(scratch, len(layouts), square)
    scratch.free(*grams)
    bases = _write_division(scratch, layouts, square)
    scratch.free(*once, second)
    return bases, sums


def _write_grams(scratch: Scratch, number: int, square: int, *, more: int = 0) -> int:
    """The Gram matrices of a rank's rows, and the id of what all ranks' give."""
    own = [scratch.alloc(_WHO, ("Gram matrix", square)) for _ in range(number)]
    together = scratch.alloc(_WHO, ("Gram matrices of all ranks", number * square + more))
    scratch.free(*own)
    return together


def _write_division(scratch: Scratch, layouts: Sequence[MatrixLayout], square: int) -> list[int]:
    """Every sketch divided by the Cholesky factor of its Gram matrix."""
    divided = []
    for layout in layouts:
        factor = scratch.alloc(_WHO, ("Cholesky factor", square))
        divided.append(scratch.alloc(_WHO, ("sketch made orthonormal", _tall_bytes(layout))))
        scratch.free(factor)
    return divided


def _alloc_all(scratch: Scratch, what: str, layouts: Sequence[MatrixLayout]) -> list[int]:
    return [scratch.alloc(_WHO, (what, _tall_bytes(layout))) for layout in layouts]


def _tall_bytes(layout: MatrixLayout) -> int:
    return layout.rows * layout.rank * _FP32_BYTES


def _wide_bytes(layout: MatrixLayout) -> int:
    return layout.columns * layout.rank * _FP32_BYTES


def _chunk_bytes(layout: MatrixLayout) -> int:
    return chunk_rows(layout.rows, layout.columns) * layout.columns * _FP32_BYTES
