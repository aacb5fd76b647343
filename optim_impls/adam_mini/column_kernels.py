"""Triton kernels of Adam-mini for neurons that are columns of a row-major matrix, as in GPT-2's `Conv1D` `[in, out]`.

Three launches: sums of squares of each column over tiles of rows, their sum for each block in a fixed order, the
update. A matrix is `[num_rows, num_columns]`; its columns fall into periods of grouped and single heads, see
`optplan.planner.optimizers.adam_mini_blocks`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optplan.optim_impls.adam_mini.kernels import (
    FIRST,
    SIZE_A,
    SIZE_B,
    SUM_BASE,
    UNSPECIALIZED,
    coefficients,
    decayed,
    pointers,
    random_key,
    second_moment,
    step_over,
    word,
)
from optplan.optim_impls.adam_mini.segment_kernels import update_tile
from optplan.optim_impls.triton_math import tl_fp32

PARTIAL_BASE: tl.constexpr = tl.constexpr(6)
HEAD_DIM: tl.constexpr = tl.constexpr(7)
NUM_GROUPED: tl.constexpr = tl.constexpr(8)
NUM_SINGLE: tl.constexpr = tl.constexpr(9)


@triton.jit
def tile_of(pieces, chunks, chunk, TILE: tl.constexpr, ALIGNED: tl.constexpr):
    """Piece of a chunk, its tile down, first row and columns of the tile, and the sizes of the matrix."""
    piece = tl.load(chunks + chunk * 2)
    tile = tl.load(chunks + chunk * 2 + 1)
    num_rows, num_columns = word(pieces, piece, SIZE_A), word(pieces, piece, SIZE_B)
    if ALIGNED:
        # The same number, but the compiler sees that it is a multiple of 16 and keeps loads whole.
        num_columns = num_columns // 16 * 16
    across = (num_columns + TILE - 1) // TILE
    columns = (tile % across) * TILE + tl.arange(0, TILE)
    return piece, tile // across, tile // across * TILE, columns, num_rows, num_columns


@triton.jit(do_not_specialize=UNSPECIALIZED)
def column_sums_kernel(
    table, pieces_at, chunks_at, device_values, partials, scale,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ON_DEVICE: tl.constexpr, ALIGNED: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sums of squares over the rows of each tile, to `partials` [tiles down, columns] of the piece."""
    pieces, chunks = table + pieces_at, table + chunks_at
    piece, down, first, columns, num_rows, num_columns = tile_of(pieces, chunks, tl.program_id(0), TILE, ALIGNED)
    _, g_base, _ = pointers(pieces, piece, P, G, M, ALIGNED)
    _, _, _, scale = coefficients(pieces, piece, device_values, 0.0, 0.0, 0.0, scale, ON_DEVICE)
    squares = tl.zeros([ROWS, TILE], tl.float32)
    for step in range(0, TILE, ROWS):
        rows = first + step + tl.arange(0, ROWS)
        mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
        offsets = rows[:, None] * num_columns + columns[None, :]
        g = tl_fp32(tl.load(g_base + offsets, mask=mask, other=0.0)) * scale
        squares += g * g
    at = partials + word(pieces, piece, PARTIAL_BASE) + down * num_columns + columns
    tl.store(at, tl.sum(squares, axis=0), mask=columns < num_columns)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def column_moments_kernel(
    table, pieces_at, sums_at, partials, shared_sums, beta2, beta2_rest,
    SHARED: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Second moments of the columns of one head; at `sums_at` int64 [heads, 2]: piece, head."""
    pieces = table + pieces_at
    row = table + sums_at + tl.program_id(0) * 2
    piece, head = tl.load(row), tl.load(row + 1)
    num_rows, num_columns = word(pieces, piece, SIZE_A), word(pieces, piece, SIZE_B)
    head_dim, num_grouped = word(pieces, piece, HEAD_DIM), word(pieces, piece, NUM_GROUPED)
    num_single = word(pieces, piece, NUM_SINGLE)
    lane = tl.arange(0, LANES)
    mask = (lane < head_dim) & (head * head_dim + lane < num_columns)
    at = partials + word(pieces, piece, PARTIAL_BASE) + head * head_dim + lane
    column_sums = tl.zeros([LANES], tl.float32)
    down = num_rows * 0
    while down * TILE < num_rows:
        column_sums += tl.load(at + down * num_columns, mask=mask, other=0.0)
        down += 1
    period, place = head // (num_grouped + num_single), head % (num_grouped + num_single)
    block = period * (num_grouped + num_single * head_dim)
    first, shared = second_moment(pieces, piece) + block, shared_sums
    if SHARED:
        shared = shared_sums + word(pieces, piece, SUM_BASE) + block
    rows = num_rows.to(tl.float32)
    if place < num_grouped:
        total = tl.sum(column_sums, axis=0)
        if SHARED:
            tl.store(shared + place, total)
        else:
            v = decayed(tl.load(first + place), total / (rows * head_dim.to(tl.float32)), beta2, beta2_rest)
            tl.store(first + place, v)
    else:
        single = num_grouped + (place - num_grouped) * head_dim + lane
        if SHARED:
            tl.store(shared + single, column_sums, mask=mask)
        else:
            moments = decayed(tl.load(first + single, mask=mask, other=0.0), column_sums / rows, beta2, beta2_rest)
            tl.store(first + single, moments, mask=mask)


@triton.jit
def block_of(columns, head_dim, num_grouped, num_single):
    """Block of each column."""
    width = (num_grouped + num_single) * head_dim
    place = columns % width
    single = num_grouped + place - num_grouped * head_dim
    within = tl.where(place < num_grouped * head_dim, place // head_dim, single)
    return columns // width * (num_grouped + num_single * head_dim) + within


@triton.jit(do_not_specialize=UNSPECIALIZED)
def column_update_kernel(
    table, pieces_at, chunks_at, device_values, decay, step_size, inverse_root, scale, seed, step, beta1_rest, eps,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ON_DEVICE: tl.constexpr, STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """First moment and parameter of each tile."""
    pieces, chunks = table + pieces_at, table + chunks_at
    piece, _, first, columns, num_rows, num_columns = tile_of(pieces, chunks, tl.program_id(0), TILE, ALIGNED)
    p_base, g_base, m_base = pointers(pieces, piece, P, G, M, ALIGNED)
    decay, step_size, inverse_root, scale = coefficients(
        pieces, piece, device_values, decay, step_size, inverse_root, scale, ON_DEVICE
    )
    block = block_of(
        columns, word(pieces, piece, HEAD_DIM), word(pieces, piece, NUM_GROUPED), word(pieces, piece, NUM_SINGLE)
    )
    v = tl.load(second_moment(pieces, piece) + block, mask=columns < num_columns, other=0.0)
    factor = step_over(v, step_size, inverse_root, eps)[None, :]
    key = seed
    if STOCHASTIC:
        key = random_key(pieces, piece, device_values, seed, step, ON_DEVICE)
    begin = word(pieces, piece, FIRST) + first * num_columns
    for step in range(0, TILE, ROWS):
        rows = first + step + tl.arange(0, ROWS)
        mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
        at = rows[:, None] * num_columns + columns[None, :]
        update_tile(
            p_base + at, g_base + at, m_base + at, mask, begin, at - first * num_columns,
            factor, decay, scale, beta1_rest, key, STOCHASTIC, True,
        )  # fmt: skip
