"""What lies between the two passes: starts for dead columns, and Cholesky-QR of every sketch, in launches for all.

A matrix's tall factors are shared out to `SHARES` programs; each leaves a partial result and the next kernel adds them
in order. The Gram matrices and their factors stay in fp32, on no tensor core.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optplan.optim_impls.adapprox.kernels import (
    COLUMNS,
    FIELDS,
    ROWS,
    SCALES,
    SPLITS_A,
    SPLITS_B,
    SUMS,
    Q,
    U,
    Y,
    Z,
    as_tf32,
    load_factor,
)
from optplan.optim_impls.adapprox.layout import SHARES as _SHARES
from optplan.optim_impls.adapprox.layout import Field
from optplan.optim_impls.adapprox.subspace import START_STRIDE
from optplan.optim_impls.triton_math import tl_hash

SHARES = tl.constexpr(_SHARES)
PEAKS, GRAMS, BASIS = (tl.constexpr(int(f)) for f in (Field.PEAKS, Field.GRAMS, Field.BASIS))
SEED, NUM_SUMS = tl.constexpr(int(Field.SEED)), tl.constexpr(int(Field.NUM_SUMS))
BLOCK = tl.constexpr(64)
STRIDE = tl.constexpr(START_STRIDE)


@triton.jit
def share_of(size, share):
    """First and last row of one program's share."""
    length = tl.cdiv(size, SHARES)
    return tl.minimum(share * length, size), tl.minimum((share + 1) * length, size)


@triton.jit
def column_peaks(scratch, row, R: tl.constexpr):
    """The largest magnitude of each column, from what the shares left."""
    at = tl.arange(0, SHARES)[:, None] * R + tl.arange(0, R)[None, :]
    return tl.max(tl.load(scratch + tl.load(row + PEAKS) + at), axis=0)


@triton.jit
def peaks_kernel(table, scratch, RANK: tl.constexpr, R: tl.constexpr):
    """Largest magnitudes of U's columns over one share."""
    row = table + tl.program_id(0).to(tl.int64) * FIELDS
    columns = tl.load(row + COLUMNS).to(tl.int32)
    first, last = share_of(columns, tl.program_id(1))
    factor = tl.load(row + U).to(tl.pointer_type(tl.float32))
    peaks = tl.zeros([R], tl.float32)
    for start in range(first, last, BLOCK):
        u = load_factor(factor, start + tl.arange(0, BLOCK), last, RANK, R)
        peaks = tl.maximum(peaks, tl.max(tl.abs(u), axis=0))
    tl.store(scratch + tl.load(row + PEAKS) + tl.program_id(1) * R + tl.arange(0, R), peaks)


@triton.jit
def empty_or_draw(pointer, size, share, seed, dead, height, RANK: tl.constexpr, R: tl.constexpr):
    """Overwrite a share of the dead columns with uniform draws between -height and height."""
    first, last = share_of(size, share)
    k = tl.arange(0, R)
    for start in range(first, last, BLOCK):
        i = start + tl.arange(0, BLOCK)
        bits = tl_hash(i.to(tl.int64)[:, None] * STRIDE + k[None, :], seed)
        drawn = ((bits >> 8).to(tl.float32) * (2.0**-23) - 1.0) * height
        offsets = i.to(tl.int64)[:, None] * RANK + k[None, :]
        tl.store(pointer + offsets, drawn, mask=(i < last)[:, None] & (dead & (k < RANK))[None, :])


@triton.jit
def revive_kernel(table, scratch, RANK: tl.constexpr, R: tl.constexpr):
    """New starts for U's zero columns, whose columns of Q are emptied; and the number that brings U near 1."""
    row = table + tl.program_id(0).to(tl.int64) * FIELDS
    share = tl.program_id(1)
    peaks = column_peaks(scratch, row, R)
    largest = tl.max(peaks, axis=0)
    height = tl.where(largest > 0, largest, 1.0)
    dead = peaks == 0
    if tl.sum((dead & (tl.arange(0, R) < RANK)).to(tl.int32), axis=0) > 0:
        q, u = tl.load(row + Q).to(tl.pointer_type(tl.float32)), tl.load(row + U).to(tl.pointer_type(tl.float32))
        seed = tl.load(row + SEED).to(tl.int32)
        empty_or_draw(u, tl.load(row + COLUMNS).to(tl.int32), share, seed, dead, height, RANK, R)
        empty_or_draw(q, tl.load(row + ROWS).to(tl.int32), share, seed, dead, 0.0, RANK, R)
    if share == 0:
        tl.store(scratch + tl.load(row + SCALES), 1.0 / height)


@triton.jit
def gather_kernel(table, scratch, R: tl.constexpr):
    """Add pass A's partial sketches into the first, and find the peaks of its columns."""
    row = table + tl.program_id(0).to(tl.int64) * FIELDS
    rows, splits = tl.load(row + ROWS), tl.load(row + SPLITS_A).to(tl.int32)
    first, last = share_of(rows.to(tl.int32), tl.program_id(1))
    sketch = scratch + tl.load(row + Y)
    k = tl.arange(0, R)
    peaks = tl.zeros([R], tl.float32)
    for start in range(first, last, BLOCK):
        i = start + tl.arange(0, BLOCK)
        y = load_factor(sketch, i, last, R, R)
        for split in range(1, splits):
            y += load_factor(sketch + split * rows * R, i, last, R, R)
        peaks = tl.maximum(peaks, tl.max(tl.abs(y), axis=0))
        tl.store(sketch + i.to(tl.int64)[:, None] * R + k[None, :], y, mask=(i < last)[:, None])
    tl.store(scratch + tl.load(row + PEAKS) + tl.program_id(1) * R + k, peaks)


@triton.jit
def gram_kernel(table, scratch, R: tl.constexpr, FIRST: tl.constexpr):
    """YᵀY over one share; the first time with columns brought to a peak of 1."""
    row = table + tl.program_id(0).to(tl.int64) * FIELDS
    first, last = share_of(tl.load(row + ROWS).to(tl.int32), tl.program_id(1))
    sketch = scratch + tl.load(row + Y)
    k = tl.arange(0, R)
    scale = tl.full([R], 1.0, tl.float32)
    if FIRST:
        peaks = column_peaks(scratch, row, R)
        scale = tl.where(peaks > 0, 1.0 / peaks, 0.0)
    gram = tl.zeros([R, R], tl.float32)
    for start in range(first, last, BLOCK):
        y = load_factor(sketch, start + tl.arange(0, BLOCK), last, R, R) * scale[None, :]
        gram = tl.dot(tl.trans(y), y, acc=gram, input_precision="ieee")
    at = scratch + tl.load(row + GRAMS) + tl.program_id(1) * R * R
    tl.store(at + k[:, None] * R + k[None, :], gram)


@triton.jit
def inverse_of_cholesky(gram, R: tl.constexpr):
    """L⁻¹ `[R, R]` with L Lᵀ the symmetric positive matrix given, by elimination."""
    i, j = tl.arange(0, R)[:, None], tl.arange(0, R)[None, :]
    inverse = tl.where(i == j, 1.0, 0.0)
    for pivot in range(R):
        column = tl.sum(tl.where(j == pivot, gram, 0.0), axis=1)
        line = tl.sum(tl.where(i == pivot, gram, 0.0), axis=0)
        root = tl.sqrt(tl.maximum(tl.sum(tl.where(tl.arange(0, R) == pivot, column, 0.0), axis=0), 1e-9))
        done = tl.sum(tl.where(i == pivot, inverse, 0.0), axis=0) / root
        below = tl.where(tl.arange(0, R) > pivot, column / root, 0.0)
        right = tl.where(tl.arange(0, R) > pivot, line / root, 0.0)
        gram -= below[:, None] * right[None, :]
        inverse = tl.where(i == pivot, done[None, :], inverse - below[:, None] * done[None, :])
    return inverse


@triton.jit
def factor_kernel(table, scratch, clip, shift, R: tl.constexpr, FIRST: tl.constexpr, MANY: tl.constexpr):
    """The `[R, R]` matrix that makes a sketch orthonormal from the right; the first time also the clip's factor."""
    row = table + tl.program_id(0).to(tl.int64) * FIELDS
    i, j = tl.arange(0, R)[:, None], tl.arange(0, R)[None, :]
    gram = tl.zeros([R, R], tl.float32)
    for share in range(SHARES):
        gram += tl.load(scratch + tl.load(row + GRAMS) + share * R * R + i * R + j)
    scale = tl.full([R], 1.0, tl.float32)
    if FIRST:
        diagonal = tl.sum(tl.where(i == j, gram, 0.0), axis=0)
        unit = 1.0 / tl.sqrt(tl.maximum(diagonal, 1.0))
        gram = gram * unit[:, None] * unit[None, :]
        peaks = column_peaks(scratch, row, R)
        scale = tl.where(peaks > 0, unit / peaks, 0.0)
        total = tl.zeros([MANY], tl.float32)
        num_sums = tl.load(row + NUM_SUMS).to(tl.int32)
        for start in range(0, num_sums, MANY):
            at = start + tl.arange(0, MANY)
            total += tl.load(scratch + tl.load(row + SUMS) + at, mask=at < num_sums, other=0.0)
        numel = (tl.load(row + ROWS) * tl.load(row + COLUMNS)).to(tl.float32)
        rms = tl.sqrt(tl.sum(total, axis=0) / numel)
        tl.store(scratch + tl.load(row + SCALES) + 1, 1.0 / tl.where(rms <= clip, 1.0, rms / clip))
    inverse = inverse_of_cholesky(gram + tl.where(i == j, shift, 0.0), R)
    tl.store(scratch + tl.load(row + BASIS) + j * R + i, inverse * scale[None, :])


@triton.jit
def apply_kernel(table, scratch, R: tl.constexpr, LAST: tl.constexpr):
    """Multiply a share of the sketch by that matrix; the last time round to what tensor cores read exactly."""
    row = table + tl.program_id(0).to(tl.int64) * FIELDS
    first, last = share_of(tl.load(row + ROWS).to(tl.int32), tl.program_id(1))
    sketch = scratch + tl.load(row + Y)
    k = tl.arange(0, R)
    basis = tl.load(scratch + tl.load(row + BASIS) + k[:, None] * R + k[None, :])
    for start in range(first, last, BLOCK):
        i = start + tl.arange(0, BLOCK)
        y = tl.dot(load_factor(sketch, i, last, R, R), basis, input_precision="ieee")
        if LAST:
            y = as_tf32(y)
        tl.store(sketch + i.to(tl.int64)[:, None] * R + k[None, :], y, mask=(i < last)[:, None])


@triton.jit
def store_factors_kernel(table, scratch, RANK: tl.constexpr, R: tl.constexpr):
    """Add pass B's partial Z into U, and copy the new Q, one share of each."""
    row = table + tl.program_id(0).to(tl.int64) * FIELDS
    columns, splits = tl.load(row + COLUMNS), tl.load(row + SPLITS_B).to(tl.int32)
    q, u = tl.load(row + Q).to(tl.pointer_type(tl.float32)), tl.load(row + U).to(tl.pointer_type(tl.float32))
    k = tl.arange(0, R)
    first, last = share_of(columns.to(tl.int32), tl.program_id(1))
    for start in range(first, last, BLOCK):
        j = start + tl.arange(0, BLOCK)
        z = load_factor(scratch + tl.load(row + Z), j, last, R, R)
        for split in range(1, splits):
            z += load_factor(scratch + tl.load(row + Z) + split * columns * R, j, last, R, R)
        at = u + j.to(tl.int64)[:, None] * RANK + k[None, :]
        tl.store(at, z, mask=(j < last)[:, None] & (k < RANK)[None, :])
    first, last = share_of(tl.load(row + ROWS).to(tl.int32), tl.program_id(1))
    for start in range(first, last, BLOCK):
        i = start + tl.arange(0, BLOCK)
        y = load_factor(scratch + tl.load(row + Y), i, last, R, R)
        at = q + i.to(tl.int64)[:, None] * RANK + k[None, :]
        tl.store(at, y, mask=(i < last)[:, None] & (k < RANK)[None, :])
