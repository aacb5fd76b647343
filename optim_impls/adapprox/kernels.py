"""The two passes of Adapprox's fast mode over the gradient, tile by tile of the second moment.

Every launch serves many matrices: `table` holds a row of pointers, sizes and scratch offsets for each (`layout.py`
writes it), `owners` the matrix that each program works for. A program of pass A walks along a band of rows, one of
pass B down a band of columns, so each sums its part of Y or Z in registers and in a fixed order: two runs agree to
the bit. The tile of V is rebuilt from the factors, clamped and used at once.

Tensor cores take operands of 8 or 11 bits, and a factor that is renewed from rounded operands at every step drifts.
So pass B multiplies only what the product of the old factors does not explain,

    V = beta2 Q Uᵀ + D,   D = beta2 max(-Q Uᵀ, 0) + (1 - beta2) G²,

which is about a thousandth of V, and the kernels between and after the passes add beta2 U (Qᵀ Q') in fp32. Pass A's
product decides a subspace and nothing else.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optplan.optim_impls.adapprox.layout import FIELDS as _FIELDS
from optplan.optim_impls.adapprox.layout import Field
from optplan.optim_impls.adapprox.subspace import STEPS_TWICE
from optplan.optim_impls.triton_math import tl_bf16, tl_cast, tl_dot_bf16, tl_fp32, tl_reciprocal, tl_root

FIELDS = tl.constexpr(_FIELDS)
W, G, M, Q, U = (tl.constexpr(int(f)) for f in (Field.W, Field.G, Field.M, Field.Q, Field.U))
ROWS, COLUMNS = tl.constexpr(int(Field.ROWS)), tl.constexpr(int(Field.COLUMNS))
Y, Z, SUMS, SCALES = (tl.constexpr(int(f)) for f in (Field.Y, Field.Z, Field.SUMS, Field.SCALES))
PEAKS, START, REST, BASIS = (tl.constexpr(int(f)) for f in (Field.PEAKS, Field.START, Field.REST, Field.BASIS))
FIRST_A, BANDS_A, WIDTH_A = (tl.constexpr(int(f)) for f in (Field.FIRST_A, Field.BANDS_A, Field.WIDTH_A))
STEP, LAST_TWICE = tl.constexpr(int(Field.STEP)), tl.constexpr(STEPS_TWICE)
FIRST_B, BANDS_B, HEIGHT_B = (tl.constexpr(int(f)) for f in (Field.FIRST_B, Field.BANDS_B, Field.HEIGHT_B))


@triton.jit
def as_tf32(x):
    """The nearest number that tensor cores read exactly."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def number(x, KIND: tl.constexpr):
    """A number that may be absent (one), given by value, or lie in device memory in any dtype: KIND is 0, 1 or more."""
    if KIND == 0:
        return 1.0
    elif KIND == 1:
        return x
    else:
        return tl.load(x).to(tl.float32)


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
def pointer_to(row, field: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer in a field; where it is known to begin at 16 bytes, loads take 16 bytes at a time."""
    pointer = tl.load(row + field).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def part_of(scratch, row, field: tl.constexpr):
    """Where a part of the scratch begins, at 16 bytes."""
    return scratch + tl.multiple_of(tl.load(row + field), 4)


@triton.jit
def halves_of(scratch, row, field: tl.constexpr):
    """A part of the scratch that holds bf16 numbers."""
    return tl.multiple_of(part_of(scratch, row, field).to(tl.pointer_type(tl.bfloat16)), 16)


@triton.jit
def is_over(row):
    """Whether a matrix, whose steps are counted on the device, is past those that iterate twice."""
    return tl.load(tl.load(row + STEP).to(tl.pointer_type(tl.float32))) > LAST_TWICE


@triton.jit
def sketch_kernel(
    table, owners, scratch, grad_scale, beta2, rest2, eps,
    GRAD: tl.constexpr, SCALED: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """Pass A: a band of BM rows of Y = V X, and the band's sum of squares of G / (sqrt(V) + eps).

    AGAIN is 0 for the first iteration, whose X is U; in the second `again_kernel` has left it where Z is to be. It is
    above 1 where only the device knows whether there is to be a second.

    PARTS is 1 to rebuild Q Uᵀ from bf16 factors, 3 for nearly fp32: what bf16 leaves of either is multiplied too.
    Everything that V enters is computed for c V, with c near 1 / max |U|, so that squares of small gradients survive.
    """
    pid = tl.program_id(0)
    row = table + tl.load(owners + pid).to(tl.int64) * FIELDS
    if AGAIN > 1:
        over = is_over(row)
        if over:
            return
    local = (pid - tl.load(row + FIRST_A)).to(tl.int32)
    bands = tl.load(row + BANDS_A).to(tl.int32)
    band, split = local % bands, local // bands
    rows, columns = tl.load(row + ROWS).to(tl.int32), tl.load(row + COLUMNS).to(tl.int32)
    width = tl.multiple_of(tl.load(row + WIDTH_A).to(tl.int32), BN)
    if EVEN:
        columns = tl.multiple_of(columns, 8)
    grad, factor = pointer_to(row, G, GRAD, EVEN), pointer_to(row, Q, tl.float32, EVEN)
    starts, rests = halves_of(scratch, row, START), halves_of(scratch, row, REST)
    c = tl.load(part_of(scratch, row, SCALES))
    peaks = tl.load(part_of(scratch, row, PEAKS) + tl.arange(0, R))
    i = band * BM + tl.arange(0, BM)
    q = load_factor(factor, i, rows, RANK, R) * tl.where(peaks > 0, beta2 * c, 0.0)[None, :]
    coarse = tl_bf16(q)
    fine = tl_bf16(q - tl_fp32(coarse))
    scale = number(grad_scale, SCALED)
    rest, small = rest2 * c * scale * scale, eps * tl.sqrt(c)
    first = split * width
    last = tl.minimum(columns, first + width)
    lines = (band * BM).to(tl.int64) * columns
    tile = tl.arange(0, BM)[:, None] * columns + tl.arange(0, BN)[None, :]
    start_tile = tl.arange(0, BN)[:, None] * R + tl.arange(0, R)[None, :]
    y = tl.zeros([BM, R], tl.float32)
    total = tl.zeros([BM], tl.float32)
    for at in tl.range(first, last, BN, num_stages=STAGES):
        inside = (at + tl.arange(0, BN)) < last
        x = tl.load(starts + at * R + start_tile, mask=inside[:, None], other=0.0)
        g = tl_fp32(tl.load(grad + lines + at + tile, mask=(i < rows)[:, None] & inside[None, :], other=0.0))
        low = tl.zeros([BM, BN], tl.float32)
        if PARTS == 3:
            x_rest = tl.load(rests + at * R + start_tile, mask=inside[:, None], other=0.0)
            low = tl_dot_bf16(coarse, tl.trans(x_rest), tl_dot_bf16(fine, tl.trans(x), low))
        low = tl_dot_bf16(coarse, tl.trans(x), low)
        square = g * g
        v = rest * square + tl.maximum(low, 0.0)
        root = tl_reciprocal(tl_root(v) + small)
        total += tl.sum(square * root * root, axis=1)
        if AGAIN:
            x = tl.load(part_of(scratch, row, Z) + at * R + start_tile, mask=inside[:, None], other=0.0)
            x = tl_bf16(x)
        y = tl_dot_bf16(tl_bf16(v), x, y)
    if AGAIN:
        y = y * tl.load(part_of(scratch, row, SCALES) + 2)
    else:
        y = y * tl.where(peaks > 0, 1.0 / peaks, 1.0)[None, :]
    out = (split * rows.to(tl.int64) + i)[:, None] * R + tl.arange(0, R)[None, :]
    tl.store(part_of(scratch, row, Y) + out, y, mask=(i < rows)[:, None])
    tl.store(part_of(scratch, row, SUMS) + local, tl.sum(total, axis=0) * (c * scale * scale))


@triton.jit
def update_kernel(
    table, owners, scratch, grad_scale, lr, weight_decay, beta1, rest1, beta2, rest2, eps,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr, SCALED: tl.constexpr, LR: tl.constexpr,
    RANK: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """Pass B: the clipped update of a band of BN columns of W and M, and the band of Z = Dᵀ Q' (Q' in bf16 in BASIS).

    MOMENT is None where no first moment is kept. PARTS is 3 to multiply also what the tensor cores' 11 bits leave of U;
    Q has no more. AGAIN is 0 but where a second iteration is to follow, for which Z is all that is made.
    """
    pid = tl.program_id(0)
    row = table + tl.load(owners + pid).to(tl.int64) * FIELDS
    if AGAIN > 1:
        over = is_over(row)
        if over:
            return
    local = (pid - tl.load(row + FIRST_B)).to(tl.int32)
    bands = tl.load(row + BANDS_B).to(tl.int32)
    band, split = local % bands, local // bands
    height = tl.load(row + HEIGHT_B).to(tl.int32)
    rows, columns = tl.load(row + ROWS).to(tl.int32), tl.load(row + COLUMNS).to(tl.int32)
    if EVEN:
        columns = tl.multiple_of(columns, 8)
    weight, grad = pointer_to(row, W, WEIGHT, EVEN), pointer_to(row, G, GRAD, EVEN)
    moment = weight
    if MOMENT is not None:
        moment = pointer_to(row, M, MOMENT, EVEN)
    old, new = pointer_to(row, Q, tl.float32, EVEN), halves_of(scratch, row, BASIS)
    j = band * BN + tl.arange(0, BN)
    u = load_factor(pointer_to(row, U, tl.float32, EVEN), j, columns, RANK, R) * beta2
    coarse = as_tf32(u)
    fine = tl.trans(as_tf32(u - coarse))
    coarse = tl.trans(coarse)
    rate = number(lr, LR)
    decay = 1.0 - rate * weight_decay
    scale = number(grad_scale, SCALED)
    gain = tl.load(part_of(scratch, row, SCALES) + 1) * scale
    rest = rest2 * scale * scale
    if MOMENT is not None:
        gain *= rest1
    last = tl.minimum(rows, (split + 1) * height)
    i, k = tl.arange(0, BM), tl.arange(0, R)
    tile = i[:, None] * columns + tl.arange(0, BN)[None, :]
    old_tile, new_tile = i[:, None] * RANK + k[None, :], i[:, None] * R + k[None, :]
    z = tl.zeros([BN, R], tl.float32)
    for first in tl.range(split * height, last, BM, num_stages=STAGES):
        corner = columns.to(tl.int64) * first + band * BN
        below = (i < last - first)[:, None]
        live = below & (j < columns)[None, :]
        if RANK == R:
            q = tl.load(old + first * RANK + old_tile, mask=below, other=0.0)
        else:
            q = tl.load(old + first * RANK + old_tile, mask=below & (k < RANK)[None, :], other=0.0)
        q_new = tl.load(new + first * R + new_tile, mask=below, other=0.0)
        g = tl_fp32(tl.load(grad + corner + tile, mask=live, other=0.0))
        w = 0.0
        m = 0.0
        if not AGAIN:
            w = tl_fp32(tl.load(weight + corner + tile, mask=live, other=0.0))
        if MOMENT is not None:
            m = tl_fp32(tl.load(moment + corner + tile, mask=live, other=0.0))
        low = tl.zeros([BM, BN], tl.float32)
        if PARTS == 3:
            low = tl.dot(q, fine, acc=low, input_precision="tf32")
        low = tl.dot(q, coarse, acc=low, input_precision="tf32")
        v = rest * (g * g) + tl.maximum(low, 0.0)
        if not AGAIN:
            move = g * tl_reciprocal(tl_root(v) + eps) * gain
            if MOMENT is not None:
                move = beta1 * m + move
                tl.store(moment + corner + tile, tl_cast(move, MOMENT), mask=live)
            tl.store(weight + corner + tile, tl_cast(decay * w - rate * move, WEIGHT), mask=live)
        z = tl_dot_bf16(tl.trans(tl_bf16(v - low)), q_new, z)
    at = (split * columns.to(tl.int64) + j)[:, None] * R + tl.arange(0, R)[None, :]
    tl.store(part_of(scratch, row, Z) + at, z, mask=(j < columns)[:, None])
