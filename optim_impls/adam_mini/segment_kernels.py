"""Triton kernels of Adam-mini for blocks larger than one program: heads of queries and keys, whole tensors.

Three launches: partial sums of squares, their sum for each block in a fixed order, the update. No atomics. Where ranks
share a block, the second launch leaves the sum over this rank's part instead (SHARED).
"""

from __future__ import annotations

import triton
import triton.language as tl

from optplan.optim_impls.adam_mini.kernels import (
    FIRST,
    SIZE_A,
    SUM_BASE,
    UNSPECIALIZED,
    coefficients,
    decayed,
    pointers,
    random_key,
    rounded,
    second_moment,
    step_over,
    word,
)
from optplan.optim_impls.triton_math import tl_cast, tl_fp32


@triton.jit
def chunk_bounds(pieces, chunks, chunk, CHUNK: tl.constexpr, ALIGNED: tl.constexpr):
    """Piece of a chunk, its first element, the block it lies in, and the end of both."""
    piece = tl.load(chunks + chunk * 2)
    start = tl.load(chunks + chunk * 2 + 1)
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    block_numel = word(pieces, piece, SIZE_A)
    block = start // block_numel
    end = tl.minimum(start + CHUNK, (block + 1) * block_numel)
    return piece, start, block, end


@triton.jit(do_not_specialize=UNSPECIALIZED)
def segment_sums_kernel(
    table, pieces_at, chunks_at, device_values, partials, partials_at, scale,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ON_DEVICE: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The sum of squares of each chunk, to `partials` [chunks] at `partials_at`."""
    pieces, chunks = table + pieces_at, table + chunks_at
    chunk = tl.program_id(0)
    piece, start, _, end = chunk_bounds(pieces, chunks, chunk, CHUNK, ALIGNED)
    _, g_base, _ = pointers(pieces, piece, P, G, M, ALIGNED)
    _, _, _, scale = coefficients(pieces, piece, device_values, 0.0, 0.0, 0.0, scale, ON_DEVICE)
    lane = tl.arange(0, TILE)
    squares = tl.zeros([TILE], tl.float32)
    for tile in range(0, CHUNK, TILE):
        at = start + tile
        # A mask whose bound comes from memory makes every load scalar, so whole tiles go without one.
        if at + TILE <= end:
            g = tl_fp32(tl.load(g_base + at + lane)) * scale
            squares += g * g
        elif at < end:
            g = tl_fp32(tl.load(g_base + at + lane, mask=at + lane < end, other=0.0)) * scale
            squares += g * g
    tl.store(partials + partials_at + chunk, tl.sum(squares, axis=0))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def segment_moments_kernel(
    table, pieces_at, sums_at, partials, partials_at, shared_sums, beta2, beta2_rest,
    SHARED: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The second moment of a block; at `sums_at` int64 [blocks, 4]: its first chunk, number of chunks, piece, place."""
    pieces = table + pieces_at
    row = table + sums_at + tl.program_id(0) * 4
    first, count = tl.load(row), tl.load(row + 1)
    piece, block = tl.load(row + 2), tl.load(row + 3)
    lane = tl.arange(0, LANES)
    total = tl.zeros([LANES], tl.float32)
    done = count * 0
    while done < count:
        at = partials + partials_at + first + done + lane
        total += tl.load(at, mask=done + lane < count, other=0.0)
        done += LANES
    if SHARED:
        tl.store(shared_sums + word(pieces, piece, SUM_BASE) + block, tl.sum(total, axis=0))
    else:
        mean_square = tl.sum(total, axis=0) / word(pieces, piece, SIZE_A).to(tl.float32)
        v_at = second_moment(pieces, piece) + block
        tl.store(v_at, decayed(tl.load(v_at), mean_square, beta2, beta2_rest))


@triton.jit
def update_tile(
    p_at, g_at, m_at, mask, start, lane, factor, decay, scale, beta1_rest, key,
    STOCHASTIC: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """First moment and parameter of one tile, given the factor of its blocks."""
    if MASKED:
        g, m, p = tl.load(g_at, mask=mask), tl.load(m_at, mask=mask), tl.load(p_at, mask=mask)
    else:
        g, m, p = tl.load(g_at), tl.load(m_at), tl.load(p_at)
    m_new = tl_fp32(m) + (tl_fp32(g) * scale - tl_fp32(m)) * beta1_rest
    p_new = tl_fp32(p) * decay - m_new * factor
    if MASKED:
        tl.store(m_at, tl_cast(m_new, m.dtype), mask=mask)
        tl.store(p_at, rounded(p_new, p.dtype, start, lane, key, STOCHASTIC), mask=mask)
    else:
        tl.store(m_at, tl_cast(m_new, m.dtype))
        tl.store(p_at, rounded(p_new, p.dtype, start, lane, key, STOCHASTIC))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def segment_update_kernel(
    table, pieces_at, chunks_at, device_values, decay, step_size, inverse_root, scale, seed, step, beta1_rest, eps,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ON_DEVICE: tl.constexpr, STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """First moment and parameter of each chunk."""
    pieces, chunks = table + pieces_at, table + chunks_at
    piece, start, block, end = chunk_bounds(pieces, chunks, tl.program_id(0), CHUNK, ALIGNED)
    p_base, g_base, m_base = pointers(pieces, piece, P, G, M, ALIGNED)
    decay, step_size, inverse_root, scale = coefficients(
        pieces, piece, device_values, decay, step_size, inverse_root, scale, ON_DEVICE
    )
    factor = step_over(tl.load(second_moment(pieces, piece) + block), step_size, inverse_root, eps)
    key = seed
    if STOCHASTIC:
        key = random_key(pieces, piece, device_values, seed, step, ON_DEVICE)
    begin = word(pieces, piece, FIRST)
    lane = tl.arange(0, TILE)
    for tile in range(0, CHUNK, TILE):
        at = start + tile
        if at + TILE <= end:
            update_tile(
                p_base + at + lane, g_base + at + lane, m_base + at + lane, lane >= 0, begin + at, lane,
                factor, decay, scale, beta1_rest, key, STOCHASTIC, False,
            )  # fmt: skip
        elif at < end:
            update_tile(
                p_base + at + lane, g_base + at + lane, m_base + at + lane, at + lane < end, begin + at, lane,
                factor, decay, scale, beta1_rest, key, STOCHASTIC, True,
            )  # fmt: skip
