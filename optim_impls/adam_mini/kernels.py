"""Triton kernels of Adam-mini for blocks that one program holds, and for biases; and what all its kernels share.

A launch serves many tensors through a table (see `optplan.planner.optimizers.adam_mini_work`), in which it finds at
`pieces_at` int64 [pieces, PIECE_WORDS], of which the first four words are the pointers of parameter, gradient, first
and second moment, and at `chunks_at` int64 [chunks, 2], the piece of each chunk and where in it the chunk begins.

The arithmetic is that of `reference.py` in fp32. Sums are taken in an order that depends on shapes alone, so two runs
give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optplan.optim_impls.triton_math import (
    tl_bf16_stochastic,
    tl_cast,
    tl_fp32,
    tl_hash_from,
    tl_mix_seed,
    tl_pointer,
)

UNSPECIALIZED = ["pieces_at", "chunks_at", "sums_at", "partials_at", "seed", "step"]
"""Numbers that differ from launch to launch; a kernel is not compiled anew for one that 16 divides."""

PIECE_WORDS: tl.constexpr = tl.constexpr(14)
SIZE_A: tl.constexpr = tl.constexpr(4)
SIZE_B: tl.constexpr = tl.constexpr(5)
MEMBER: tl.constexpr = tl.constexpr(10)
ORDINAL: tl.constexpr = tl.constexpr(11)
FIRST: tl.constexpr = tl.constexpr(12)
SUM_BASE: tl.constexpr = tl.constexpr(13)
VALUES: tl.constexpr = tl.constexpr(5)


@triton.jit
def word(pieces, piece, column: tl.constexpr):
    """One number of a piece."""
    return tl.load(pieces + piece * PIECE_WORDS + column)


@triton.jit
def coefficients(pieces, piece, device_values, decay, step_size, inverse_root, scale, ON_DEVICE: tl.constexpr):
    """What changes from step to step, from arguments or, where the host must not know, from fp32 [tensors, 5].

    Returns:
        1 - lr weight_decay; lr / (1 - beta1^t); 1 / sqrt(1 - beta2^t); the factor on the gradient.
    """
    if ON_DEVICE:
        row = device_values + word(pieces, piece, MEMBER) * VALUES
        decay, step_size = tl.load(row), tl.load(row + 1)
        inverse_root, scale = tl.load(row + 2), tl.load(row + 3)
    return decay, step_size, inverse_root, scale


@triton.jit
def pointers(pieces, piece, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ALIGNED: tl.constexpr):
    """Parameter, gradient and first moment of a piece."""
    p = tl_pointer(pieces, piece, 0, PIECE_WORDS, P, ALIGNED)
    g = tl_pointer(pieces, piece, 1, PIECE_WORDS, G, ALIGNED)
    m = tl_pointer(pieces, piece, 2, PIECE_WORDS, M, ALIGNED)
    return p, g, m


@triton.jit
def second_moment(pieces, piece):
    """Second moments of a piece, fp32."""
    return tl_pointer(pieces, piece, 3, PIECE_WORDS, tl.float32, False)


@triton.jit
def decayed(v, mean_square, beta2, beta2_rest):
    """The second moment after this step."""
    return v * beta2 + mean_square * beta2_rest


@triton.jit
def step_over(v, step_size, inverse_root, eps):
    """Learning rate, bias corrections and denominator in one factor on the first moment."""
    return step_size / (tl.sqrt_rn(v) * inverse_root + eps)


@triton.jit
def random_key(pieces, piece, device_values, seed, step, ON_DEVICE: tl.constexpr):
    """The seed of a tensor's step, as `rounding.mix_seed` makes it."""
    if ON_DEVICE:
        step = tl.load(device_values + word(pieces, piece, MEMBER) * VALUES + 4).to(tl.int32)
    return tl_mix_seed(seed, step, word(pieces, piece, ORDINAL).to(tl.int32))


@triton.jit
def rounded(x, dtype: tl.constexpr, start, lane, key, STOCHASTIC: tl.constexpr):
    """fp32 to the parameter's dtype; `start + lane` counts elements of the whole tensor."""
    if STOCHASTIC and dtype == tl.bfloat16:
        return tl_bf16_stochastic(x, tl_hash_from(start, lane, key) & 0xFFFF)
    else:
        return tl_cast(x, dtype)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def rows_kernel(
    table, pieces_at, chunks_at, device_values, decay, step_size, inverse_root, scale, seed, step,
    beta1_rest, beta2, beta2_rest, eps,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ON_DEVICE: tl.constexpr, STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    NUMEL: tl.constexpr, WIDTH: tl.constexpr, TILE_ROWS: tl.constexpr, TILES: tl.constexpr, CHUNK_ROWS: tl.constexpr,
):  # fmt: skip
    """Blocks of `NUMEL` elements that lie one after another: mean square, both moments and the update in one pass.

    Args:
        NUMEL: Elements of a block; a constant, so that the mask of its last elements leaves loads whole.
        WIDTH: The next power of two.
        TILE_ROWS: Blocks of one program.
        TILES: Programs of one chunk.
        CHUNK_ROWS: Blocks of one chunk. Its last program may have room for more, which are the next chunk's.
    """
    pieces, chunks = table + pieces_at, table + chunks_at
    program = tl.program_id(0)
    chunk, tile = program // TILES, program % TILES
    piece = tl.load(chunks + chunk * 2)
    begin = tl.load(chunks + chunk * 2 + 1)
    first, end = begin + tile * TILE_ROWS, tl.minimum(begin + CHUNK_ROWS, word(pieces, piece, SIZE_A))
    if first < end:
        p_base, g_base, m_base = pointers(pieces, piece, P, G, M, ALIGNED)
        rows = first + tl.arange(0, TILE_ROWS)
        columns = tl.arange(0, WIDTH)
        offsets = rows[:, None] * NUMEL + columns[None, :]
        mask = columns[None, :] < NUMEL
        if TILE_ROWS > 1:
            mask = mask & (rows < end)[:, None]
        g = tl_fp32(tl.load(g_base + offsets, mask=mask, other=0.0))
        m = tl_fp32(tl.load(m_base + offsets, mask=mask, other=0.0))
        p = tl_fp32(tl.load(p_base + offsets, mask=mask, other=0.0))
        v_at = second_moment(pieces, piece) + rows
        v = tl.load(v_at, mask=rows < end, other=0.0)
        decay, step_size, inverse_root, scale = coefficients(
            pieces, piece, device_values, decay, step_size, inverse_root, scale, ON_DEVICE
        )
        g = g * scale
        v = decayed(v, tl.sum(g * g, axis=1) * (1.0 / NUMEL), beta2, beta2_rest)
        tl.store(v_at, v, mask=rows < end)
        m = m + (g - m) * beta1_rest
        tl.store(m_base + offsets, tl_cast(m, M), mask=mask)
        p = p * decay - m * step_over(v, step_size, inverse_root, eps)[:, None]
        key = seed
        if STOCHASTIC:
            key = random_key(pieces, piece, device_values, seed, step, ON_DEVICE)
        start = word(pieces, piece, FIRST) + first * NUMEL
        lane = tl.arange(0, TILE_ROWS)[:, None] * NUMEL + columns[None, :]
        tl.store(p_base + offsets, rounded(p, P, start, lane, key, STOCHASTIC), mask=mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def elements_kernel(
    table, pieces_at, chunks_at, device_values, decay, step_size, inverse_root, scale, seed, step,
    beta1_rest, beta2, beta2_rest, eps,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ON_DEVICE: tl.constexpr, STOCHASTIC: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Biases: Adam with a second moment for every element."""
    pieces, chunks = table + pieces_at, table + chunks_at
    chunk = tl.program_id(0)
    piece = tl.load(chunks + chunk * 2)
    begin = tl.load(chunks + chunk * 2 + 1)
    lane = tl.arange(0, CHUNK)
    offsets = begin + lane
    mask = offsets < word(pieces, piece, SIZE_A)
    p_base, g_base, m_base = pointers(pieces, piece, P, G, M, False)
    v_at = second_moment(pieces, piece) + offsets
    decay, step_size, inverse_root, scale = coefficients(
        pieces, piece, device_values, decay, step_size, inverse_root, scale, ON_DEVICE
    )
    g = tl_fp32(tl.load(g_base + offsets, mask=mask, other=0.0)) * scale
    m = tl_fp32(tl.load(m_base + offsets, mask=mask, other=0.0))
    p = tl_fp32(tl.load(p_base + offsets, mask=mask, other=0.0))
    v = decayed(tl.load(v_at, mask=mask, other=0.0), g * g, beta2, beta2_rest)
    tl.store(v_at, v, mask=mask)
    m = m + (g - m) * beta1_rest
    tl.store(m_base + offsets, tl_cast(m, M), mask=mask)
    p = p * decay - m * step_over(v, step_size, inverse_root, eps)
    key = seed
    if STOCHASTIC:
        key = random_key(pieces, piece, device_values, seed, step, ON_DEVICE)
    start = word(pieces, piece, FIRST) + begin
    tl.store(p_base + offsets, rounded(p, P, start, lane, key, STOCHASTIC), mask=mask)
