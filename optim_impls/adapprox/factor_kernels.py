"""What lies before, between and after the two passes: starts, Cholesky-QR of every sketch, new factors.

A matrix's tall factors are shared out to programs. Each leaves a partial result, and the one that finishes last adds
them in order and goes on from the sum, so that no launch exists for that alone and two runs agree to the bit. Gram
matrices and what is multiplied by them stay in fp32, on no tensor core.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optplan.optim_impls.adapprox.kernels import (
    BANDS_A,
    BASIS,
    COLUMNS,
    FIELDS,
    PEAKS,
    REST,
    ROWS,
    SCALES,
    START,
    SUMS,
    Q,
    U,
    Y,
    Z,
    as_tf32,
    halves_of,
    is_over,
    load_factor,
    part_of,
)
from optplan.optim_impls.adapprox.layout import Field
from optplan.optim_impls.adapprox.subspace import START_STRIDE
from optplan.optim_impls.triton_math import tl_bf16, tl_fp32, tl_hash

FIRST_SHARE, SHARES = tl.constexpr(int(Field.FIRST_SHARE)), tl.constexpr(int(Field.SHARES))
SPLITS_A, SPLITS_B = tl.constexpr(int(Field.SPLITS_A)), tl.constexpr(int(Field.SPLITS_B))
COUNT, SEED = tl.constexpr(int(Field.COUNT)), tl.constexpr(int(Field.SEED))
PARTIALS, TURN = (tl.constexpr(int(f)) for f in (Field.PARTIALS, Field.TURN))
BLOCK = tl.constexpr(64)
STRIDE = tl.constexpr(START_STRIDE)
MANY = tl.constexpr(1024)


@triton.jit
def place_of(table, owners):
    """The row of this program's matrix, its share, and how many there are."""
    pid = tl.program_id(0)
    row = table + tl.load(owners + pid).to(tl.int64) * FIELDS
    share = pid - tl.load(row + FIRST_SHARE).to(tl.int32)
    return row, share, tl.load(row + SHARES).to(tl.int32)


@triton.jit
def share_of(size, share, shares):
    """First and last row of one program's share."""
    length = tl.cdiv(tl.cdiv(size, shares), BLOCK) * BLOCK
    return tl.minimum(share * length, size), tl.minimum((share + 1) * length, size)


@triton.jit
def is_last(row, shares):
    """Whether the other programs of this matrix have stored their partial results; the counter is left at zero."""
    tl.debug_barrier()
    done = tl.atomic_add(row + COUNT, 1, sem="acq_rel", scope="gpu")
    if done == shares - 1:
        tl.store(row + COUNT, 0)
    return done == shares - 1


@triton.jit
def sum_of_partials(partials, shares, R: tl.constexpr):
    """The sum of the `[R, R]` partial results, in order."""
    at = tl.arange(0, R)[:, None] * R + tl.arange(0, R)[None, :]
    total = tl.zeros([R, R], tl.float32)
    for share in tl.range(0, shares, loop_unroll_factor=4):
        total += tl.load(partials + share * R * R + at, cache_modifier=".cg")
    return total


@triton.jit
def start_kernel(table, owners, scratch, RANK: tl.constexpr, R: tl.constexpr):
    """X: U in bf16 and what that leaves, with draws in U's zero columns; U's peaks, and what brings them near 1."""
    row, share, shares = place_of(table, owners)
    columns, k = tl.load(row + COLUMNS).to(tl.int32), tl.arange(0, R)
    first, last = share_of(columns, share, shares)
    factor = tl.load(row + U).to(tl.pointer_type(tl.float32))
    starts, rests = halves_of(scratch, row, START), halves_of(scratch, row, REST)
    peaks = tl.zeros([R], tl.float32)
    for at in range(first, last, BLOCK):
        j = at + tl.arange(0, BLOCK)
        u = load_factor(factor, j, last, RANK, R)
        peaks = tl.maximum(peaks, tl.max(tl.abs(u), axis=0))
        x = tl_bf16(u)
        out = j.to(tl.int64)[:, None] * R + k[None, :]
        tl.store(starts + out, x, mask=(j < last)[:, None])
        tl.store(rests + out, tl_bf16(u - tl_fp32(x)), mask=(j < last)[:, None])
    partials = part_of(scratch, row, PARTIALS)
    tl.store(partials + share * R + k, peaks)
    if is_last(row, shares):
        for other in range(shares):
            peaks = tl.maximum(peaks, tl.load(partials + other * R + k, cache_modifier=".cg"))
        tl.store(part_of(scratch, row, PEAKS) + k, peaks)
        largest = tl.max(peaks, axis=0)
        tl.store(part_of(scratch, row, SCALES), tl.where(largest > 0, 1.0 / tl.maximum(largest, 1e-30), 1.0))
        dead = (peaks == 0) & (k < RANK)
        if tl.sum(dead.to(tl.int32), axis=0) > 0:
            draw_starts(starts, columns, dead, tl.load(row + SEED).to(tl.int32), R)


@triton.jit
def draw_starts(starts, columns, dead, seed, R: tl.constexpr):
    """Overwrite the dead columns of X with uniform draws between -1 and 1."""
    k = tl.arange(0, R)
    for at in range(0, columns, BLOCK):
        j = at + tl.arange(0, BLOCK)
        bits = tl_hash(j.to(tl.int64)[:, None] * STRIDE + k[None, :], seed)
        drawn = ((bits >> 25).to(tl.float32) * 2.0 + 1.0) * (2.0**-7) - 1.0
        out = j.to(tl.int64)[:, None] * R + k[None, :]
        tl.store(starts + out, tl_bf16(drawn), mask=(j < columns)[:, None] & dead[None, :])


@triton.jit
def inverse_of_cholesky(gram, R: tl.constexpr):
    """L⁻¹ `[R, R]` with L Lᵀ the symmetric positive matrix given, by elimination."""
    i, j = tl.arange(0, R)[:, None], tl.arange(0, R)[None, :]
    k = tl.arange(0, R)
    inverse = tl.where(i == j, 1.0, 0.0)
    for pivot in range(R):
        line = tl.sum(tl.where(i == pivot, gram, 0.0), axis=0)
        done = tl.sum(tl.where(i == pivot, inverse, 0.0), axis=0)
        column = tl.sum(tl.where(j == pivot, gram, 0.0), axis=1)
        root = tl.sqrt(tl.maximum(tl.sum(tl.where(k == pivot, line, 0.0), axis=0), 1e-9))
        done = done / root
        below = tl.where(k > pivot, column / root, 0.0)
        gram -= below[:, None] * tl.where(k > pivot, line / root, 0.0)[None, :]
        inverse = tl.where(i == pivot, done[None, :], inverse - below[:, None] * done[None, :])
    return inverse


@triton.jit
def clip_factor(scratch, row, clip):
    """What brings the direction's RMS down to the clip, from the sums of pass A."""
    sums, num_sums = part_of(scratch, row, SUMS), (tl.load(row + BANDS_A) * tl.load(row + SPLITS_A)).to(tl.int32)
    total = tl.zeros([MANY], tl.float32)
    for start in range(0, num_sums, MANY):
        at = start + tl.arange(0, MANY)
        total += tl.load(sums + at, mask=at < num_sums, other=0.0)
    numel = (tl.load(row + ROWS) * tl.load(row + COLUMNS)).to(tl.float32)
    rms = tl.sqrt(tl.sum(total, axis=0) / numel)
    return 1.0 / tl.where(rms <= clip, 1.0, rms / clip)


@triton.jit
def gram_kernel(table, owners, scratch, clip, shift, R: tl.constexpr, AGAIN: tl.constexpr):
    """Add pass A's partial sketches into the first; the `[R, R]` matrix that makes Y nearly orthonormal; the clip."""
    row, share, shares = place_of(table, owners)
    if AGAIN > 1:
        over = is_over(row)
        if over:
            return
    rows, splits = tl.load(row + ROWS), tl.load(row + SPLITS_A).to(tl.int32)
    first, last = share_of(rows.to(tl.int32), share, shares)
    sketch, k = part_of(scratch, row, Y), tl.arange(0, R)
    square = k[:, None] * R + k[None, :]
    gram = tl.zeros([R, R], tl.float32)
    for at in range(first, last, BLOCK):
        i = at + tl.arange(0, BLOCK)
        y = load_factor(sketch, i, last, R, R)
        if splits > 1:
            for split in range(1, splits):
                y += load_factor(sketch + split * rows * R, i, last, R, R)
            tl.store(sketch + i.to(tl.int64)[:, None] * R + k[None, :], y, mask=(i < last)[:, None])
        gram = tl.dot(tl.trans(y), y, acc=gram, input_precision="ieee")
    partials = part_of(scratch, row, PARTIALS)
    tl.store(partials + share * R * R + square, gram)
    if is_last(row, shares):
        gram = sum_of_partials(partials, shares, R)
        diagonal = tl.sum(tl.where(k[:, None] == k[None, :], gram, 0.0), axis=0)
        unit = tl.where(diagonal > 1e-36, 1.0 / tl.sqrt(tl.maximum(diagonal, 1e-36)), 0.0)
        gram = gram * unit[:, None] * unit[None, :] + tl.where(k[:, None] == k[None, :], shift, 0.0)
        basis = inverse_of_cholesky(gram, R) * unit[None, :]
        tl.store(part_of(scratch, row, TURN) + k[None, :] * R + k[:, None], basis)
        tl.store(part_of(scratch, row, SCALES) + 1, clip_factor(scratch, row, clip))
        tl.store(part_of(scratch, row, SCALES) + 2, tl.min(tl.where(unit > 0, unit, 1e18), axis=0))


@triton.jit
def second_gram_kernel(table, owners, scratch, shift, R: tl.constexpr, AGAIN: tl.constexpr):
    """The matrix that makes Y orthonormal, from the Gram matrix of the nearly orthonormal product."""
    row, share, shares = place_of(table, owners)
    if AGAIN > 1:
        over = is_over(row)
        if over:
            return
    first, last = share_of(tl.load(row + ROWS).to(tl.int32), share, shares)
    sketch, k = part_of(scratch, row, Y), tl.arange(0, R)
    square = k[:, None] * R + k[None, :]
    turn = tl.load(part_of(scratch, row, TURN) + square)
    gram = tl.zeros([R, R], tl.float32)
    for at in range(first, last, BLOCK):
        i = at + tl.arange(0, BLOCK)
        y = tl.dot(load_factor(sketch, i, last, R, R), turn, input_precision="ieee")
        gram = tl.dot(tl.trans(y), y, acc=gram, input_precision="ieee")
        tl.store(sketch + i.to(tl.int64)[:, None] * R + k[None, :], y, mask=(i < last)[:, None])
    partials = part_of(scratch, row, PARTIALS)
    tl.store(partials + share * R * R + square, gram)
    if is_last(row, shares):
        gram = sum_of_partials(partials, shares, R) + tl.where(k[:, None] == k[None, :], shift, 0.0)
        tl.store(part_of(scratch, row, TURN) + k[None, :] * R + k[:, None], inverse_of_cholesky(gram, R))


@triton.jit
def basis_kernel(table, owners, scratch, beta2, RANK: tl.constexpr, R: tl.constexpr, AGAIN: tl.constexpr):
    """Q' = the sketch made orthonormal, of numbers that tensor cores read exactly, and in bf16; and beta2 Qᵀ Q'."""
    row, share, shares = place_of(table, owners)
    if AGAIN > 1:
        over = is_over(row)
        if over:
            return
    first, last = share_of(tl.load(row + ROWS).to(tl.int32), share, shares)
    sketch, halves, k = part_of(scratch, row, Y), halves_of(scratch, row, BASIS), tl.arange(0, R)
    old = tl.load(row + Q).to(tl.pointer_type(tl.float32))
    square = k[:, None] * R + k[None, :]
    turn = tl.load(part_of(scratch, row, TURN) + square)
    overlap = tl.zeros([R, R], tl.float32)
    for at in range(first, last, BLOCK):
        i = at + tl.arange(0, BLOCK)
        q = as_tf32(tl.dot(load_factor(sketch, i, last, R, R), turn, input_precision="ieee"))
        out = i.to(tl.int64)[:, None] * R + k[None, :]
        tl.store(sketch + out, q, mask=(i < last)[:, None])
        tl.store(halves + out, tl_bf16(q), mask=(i < last)[:, None])
        before = load_factor(old, i, last, RANK, R)
        overlap = tl.dot(tl.trans(before), q, acc=overlap, input_precision="ieee")
    partials = part_of(scratch, row, PARTIALS)
    tl.store(partials + share * R * R + square, overlap)
    if is_last(row, shares):
        overlap = sum_of_partials(partials, shares, R)
        tl.store(part_of(scratch, row, TURN) + square, beta2 * overlap)


@triton.jit
def gained(row, scratch, u, j, last, turn, RANK: tl.constexpr, R: tl.constexpr):
    """Rows `j` of beta2 U (Qᵀ Q') + Z, adding pass B's partial Z."""
    columns, splits = tl.load(row + COLUMNS), tl.load(row + SPLITS_B).to(tl.int32)
    parts = part_of(scratch, row, Z)
    new = tl.dot(load_factor(u, j, last, RANK, R), turn, input_precision="ieee")
    for split in range(splits):
        new += load_factor(parts + split * columns * R, j, last, R, R)
    return new


@triton.jit
def again_kernel(table, owners, scratch, RANK: tl.constexpr, R: tl.constexpr, AGAIN: tl.constexpr):
    """X of the second iteration: Vᵀ Q' brought near 1, where the first part of Z lay."""
    row, share, shares = place_of(table, owners)
    if AGAIN > 1:
        over = is_over(row)
        if over:
            return
    columns, u = tl.load(row + COLUMNS).to(tl.int32), tl.load(row + U).to(tl.pointer_type(tl.float32))
    k, scales = tl.arange(0, R), part_of(scratch, row, SCALES)
    turn = tl.load(part_of(scratch, row, TURN) + k[:, None] * R + k[None, :])
    size = tl.load(scales) * tl.load(scales + 2)
    first, last = share_of(columns, share, shares)
    for at in range(first, last, BLOCK):
        j = at + tl.arange(0, BLOCK)
        x = gained(row, scratch, u, j, last, turn, RANK, R) * size
        out = part_of(scratch, row, Z) + j.to(tl.int64)[:, None] * R + k[None, :]
        tl.store(out, x, mask=(j < last)[:, None])


@triton.jit
def store_factors_kernel(table, owners, scratch, RANK: tl.constexpr, R: tl.constexpr):
    """U' = beta2 U (Qᵀ Q') + Z, adding pass B's partial Z, and the new Q, one share of each."""
    row, share, shares = place_of(table, owners)
    q, u = tl.load(row + Q).to(tl.pointer_type(tl.float32)), tl.load(row + U).to(tl.pointer_type(tl.float32))
    sketch, k = part_of(scratch, row, Y), tl.arange(0, R)
    turn = tl.load(part_of(scratch, row, TURN) + k[:, None] * R + k[None, :])
    first, last = share_of(tl.load(row + COLUMNS).to(tl.int32), share, shares)
    for at in range(first, last, BLOCK):
        j = at + tl.arange(0, BLOCK)
        new = gained(row, scratch, u, j, last, turn, RANK, R)
        out = u + j.to(tl.int64)[:, None] * RANK + k[None, :]
        tl.store(out, new, mask=(j < last)[:, None] & (k < RANK)[None, :])
    first, last = share_of(tl.load(row + ROWS).to(tl.int32), share, shares)
    for at in range(first, last, BLOCK):
        i = at + tl.arange(0, BLOCK)
        out = q + i.to(tl.int64)[:, None] * RANK + k[None, :]
        tl.store(out, load_factor(sketch, i, last, R, R), mask=(i < last)[:, None] & (k < RANK)[None, :])
