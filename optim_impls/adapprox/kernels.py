"""The two passes of Adapprox's fast mode over the gradient, tile by tile of the second moment.

Every launch serves many matrices: `table` holds a row of pointers, sizes and scratch offsets for each (`layout.py`
writes it), `owners` the matrix that each program works for. A program of pass A walks along a band of rows, one of
pass B down a band of columns, so each sums its part of Y or Z in registers and in a fixed order: two runs agree to
the bit. The tile of V is rebuilt from the factors, clamped and used at once.

Tensor cores read the first 19 bits of an fp32 number and drop the rest, which would shrink Q Uᵀ a little at every
step. So Q is stored rounded to those bits, V is rounded before it is multiplied, and pass B splits U in two parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optplan.optim_impls.adapprox.layout import FIELDS as _FIELDS
from optplan.optim_impls.adapprox.layout import Field
from optplan.optim_impls.triton_math import tl_cast, tl_fp32

FIELDS = tl.constexpr(_FIELDS)
W, G, M, Q, U = (tl.constexpr(int(f)) for f in (Field.W, Field.G, Field.M, Field.Q, Field.U))
ROWS, COLUMNS = tl.constexpr(int(Field.ROWS)), tl.constexpr(int(Field.COLUMNS))
Y, Z, SUMS, SCALES = (tl.constexpr(int(f)) for f in (Field.Y, Field.Z, Field.SUMS, Field.SCALES))
FIRST_A, SPLITS_A, WIDTH_A = (tl.constexpr(int(f)) for f in (Field.FIRST_A, Field.SPLITS_A, Field.WIDTH_A))
FIRST_B, SPLITS_B, HEIGHT_B = (tl.constexpr(int(f)) for f in (Field.FIRST_B, Field.SPLITS_B, Field.HEIGHT_B))


@triton.jit
def as_tf32(x):
    """The nearest number that tensor cores read exactly."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def number(x, KIND: tl.constexpr):
    """A number that may be absent (one), given by value, or lie in device memory: KIND is 0, 1 or 2."""
    if KIND == 0:
        return 1.0
    elif KIND == 1:
        return x
    else:
        return tl.load(x)


@triton.jit
def load_factor(pointer, index, size, RANK: tl.constexpr, R: tl.constexpr):
    """Rows `index` of a factor `[size, RANK]` as `[len(index), R]`, zero beyond either."""
    k = tl.arange(0, R)
    offsets = index.to(tl.int64)[:, None] * RANK + k[None, :]
    live = (index < size)[:, None]
    if RANK != R:
        live = live & (k < RANK)[None, :]
    return tl.load(pointer + offsets, mask=live, other=0.0)


@triton.jit
def factor_pointer(row, field: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer to an fp32 factor; where it is known to begin at 16 bytes, loads take 16 bytes at a time."""
    pointer = tl.load(row + field).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load_tile(pointer, offsets, live):
    """A tile in fp32, zero where it is not live."""
    return tl_fp32(tl.load(pointer + offsets, mask=live, other=0.0))


@triton.jit
def sketch_kernel(
    table, owners, scratch, grad_scale, beta2, rest2, eps,
    GRAD: tl.constexpr, SCALED: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Pass A: a band of BM rows of Y = V X, and the band's sum of squares of G / (sqrt(V) + eps)."""
    pid = tl.program_id(0)
    row = table + tl.load(owners + pid).to(tl.int64) * FIELDS
    local = (pid - tl.load(row + FIRST_A)).to(tl.int32)
    splits, width = tl.load(row + SPLITS_A).to(tl.int32), tl.multiple_of(tl.load(row + WIDTH_A).to(tl.int32), BN)
    rows, columns = tl.load(row + ROWS).to(tl.int32), tl.load(row + COLUMNS).to(tl.int32)
    stride = tl.load(row + COLUMNS)
    grad, factor = tl.load(row + G).to(tl.pointer_type(GRAD)), factor_pointer(row, U, EVEN)
    if EVEN:
        grad, stride = tl.multiple_of(grad, 16), tl.multiple_of(stride, 16)
    band, split = local // splits, local % splits
    i = band * BM + tl.arange(0, BM)
    q = load_factor(factor_pointer(row, Q, EVEN), i, rows, RANK, R)
    start = tl.load(scratch + tl.load(row + SCALES))
    scale = number(grad_scale, SCALED)
    first, last = split * width, tl.minimum(columns, (split + 1) * width)
    lines = i.to(tl.int64)[:, None] * stride
    y = tl.zeros([BM, R], tl.float32)
    total = tl.zeros([BM], tl.float32)
    for tile in range(tl.cdiv(last - first, BN)):
        j = first + tile * BN + tl.arange(0, BN)
        u = load_factor(factor, j, last, RANK, R)
        live = (i < rows)[:, None]
        if not EVEN:
            live = live & (j < last)[None, :]
        g = load_tile(grad, lines + j[None, :], live) * scale
        low = tl.dot(q, tl.trans(as_tf32(u)), input_precision="tf32")
        v = beta2 * tl.maximum(low, 0.0) + rest2 * g * g
        move = g / (tl.sqrt(v) + eps)
        total += tl.sum(move * move, axis=1)
        y = tl.dot(v * start, u, acc=y, input_precision="tf32")
    at = (split * rows.to(tl.int64) + i)[:, None] * R + tl.arange(0, R)[None, :]
    tl.store(scratch + tl.multiple_of(tl.load(row + Y), 4) + at, y, mask=(i < rows)[:, None])
    tl.store(scratch + tl.load(row + SUMS) + local, tl.sum(total, axis=0))


@triton.jit
def update_kernel(
    table, owners, scratch, grad_scale, lr, weight_decay, beta1, rest1, beta2, rest2, eps,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr, SCALED: tl.constexpr, LR: tl.constexpr,
    RANK: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Pass B: the clipped update of a band of BN columns of W and M, and the band of Z = Vᵀ Q' (Q' lies in Y).

    MOMENT is None where no first moment is kept.
    """
    pid = tl.program_id(0)
    row = table + tl.load(owners + pid).to(tl.int64) * FIELDS
    local = (pid - tl.load(row + FIRST_B)).to(tl.int32)
    splits, height = tl.load(row + SPLITS_B).to(tl.int32), tl.load(row + HEIGHT_B).to(tl.int32)
    rows, columns = tl.load(row + ROWS).to(tl.int32), tl.load(row + COLUMNS).to(tl.int32)
    stride = tl.load(row + COLUMNS)
    weight, grad = tl.load(row + W).to(tl.pointer_type(WEIGHT)), tl.load(row + G).to(tl.pointer_type(GRAD))
    moment = weight
    if MOMENT is not None:
        moment = tl.load(row + M).to(tl.pointer_type(MOMENT))
    if EVEN:
        weight, grad, moment = tl.multiple_of(weight, 16), tl.multiple_of(grad, 16), tl.multiple_of(moment, 16)
        stride = tl.multiple_of(stride, 16)
    band, split = local // splits, local % splits
    j = band * BN + tl.arange(0, BN)
    u = load_factor(factor_pointer(row, U, EVEN), j, columns, RANK, R)
    coarse = as_tf32(u)
    fine = tl.trans(as_tf32(u - coarse))
    coarse = tl.trans(coarse)
    old = factor_pointer(row, Q, EVEN)
    new = scratch + tl.multiple_of(tl.load(row + Y), 4)
    clip = tl.load(scratch + tl.load(row + SCALES) + 1)
    step = number(lr, LR)
    decay = 1.0 - step * weight_decay
    scale = number(grad_scale, SCALED)
    last = tl.minimum(rows, (split + 1) * height)
    z = tl.zeros([BN, R], tl.float32)
    for first in range(split * height, last, BM):
        i = first + tl.arange(0, BM)
        q, q_new = load_factor(old, i, last, RANK, R), load_factor(new, i, last, R, R)
        offsets = i.to(tl.int64)[:, None] * stride + j[None, :]
        live = (i < last)[:, None]
        if not EVEN:
            live = live & (j < columns)[None, :]
        g = load_tile(grad, offsets, live) * scale
        w = load_tile(weight, offsets, live)
        low = tl.dot(q, coarse, acc=tl.dot(q, fine, input_precision="tf32"), input_precision="tf32")
        v = beta2 * tl.maximum(low, 0.0) + rest2 * g * g
        move = g / (tl.sqrt(v) + eps) * clip
        if MOMENT is not None:
            move = beta1 * load_tile(moment, offsets, live) + rest1 * move
            tl.store(moment + offsets, tl_cast(move, MOMENT), mask=live)
        tl.store(weight + offsets, tl_cast(decay * w - step * move, WEIGHT), mask=live)
        z = tl.dot(tl.trans(as_tf32(v)), q_new, acc=z, input_precision="tf32")
    at = (split * columns.to(tl.int64) + j)[:, None] * R + tl.arange(0, R)[None, :]
    tl.store(scratch + tl.multiple_of(tl.load(row + Z), 4) + at, z, mask=(j < columns)[:, None])
