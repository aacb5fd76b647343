"""Vectors under Adapprox: a whole second moment, and the clip by the RMS of the whole direction, in two launches."""

from __future__ import annotations

import triton
import triton.language as tl

from optplan.optim_impls.adapprox.kernels import BANDS_A, FIELDS, FIRST_A, ROWS, SUMS, G, M, Q, W, number
from optplan.optim_impls.triton_math import tl_cast, tl_fp32


@triton.jit
def vector_moment_kernel(
    table, owners, scratch, grad_scale, beta2, rest2, eps,
    GRAD: tl.constexpr, SCALED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The second moment of a chunk, and the chunk's sum of squares of G / (sqrt(V) + eps)."""
    pid = tl.program_id(0)
    row = table + tl.load(owners + pid).to(tl.int64) * FIELDS
    numel = tl.load(row + ROWS)
    local = pid - tl.load(row + FIRST_A)
    at = local * CHUNK + tl.arange(0, CHUNK)
    live = at < numel
    second = tl.load(row + Q).to(tl.pointer_type(tl.float32))
    g = tl_fp32(tl.load(tl.load(row + G).to(tl.pointer_type(GRAD)) + at, mask=live, other=0.0))
    g = g * number(grad_scale, SCALED)
    v = beta2 * tl.load(second + at, mask=live, other=0.0) + rest2 * g * g
    tl.store(second + at, v, mask=live)
    move = tl.where(live, g / (tl.sqrt(v) + eps), 0.0)
    tl.store(scratch + tl.load(row + SUMS) + local, tl.sum(move * move, axis=0))


@triton.jit
def vector_update_kernel(
    table, owners, scratch, grad_scale, lr, weight_decay, clip, beta1, rest1, eps,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr, SCALED: tl.constexpr, LR: tl.constexpr,
    MANY: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The clipped update of a chunk. MOMENT is None where no first moment is kept."""
    pid = tl.program_id(0)
    row = table + tl.load(owners + pid).to(tl.int64) * FIELDS
    numel, num_sums = tl.load(row + ROWS), tl.load(row + BANDS_A).to(tl.int32)
    total = tl.zeros([MANY], tl.float32)
    for start in range(0, num_sums, MANY):
        place = start + tl.arange(0, MANY)
        total += tl.load(scratch + tl.load(row + SUMS) + place, mask=place < num_sums, other=0.0)
    rms = tl.sqrt(tl.sum(total, axis=0) / numel.to(tl.float32))
    factor = 1.0 / tl.where(rms <= clip, 1.0, rms / clip)
    at = (pid - tl.load(row + FIRST_A)) * CHUNK + tl.arange(0, CHUNK)
    live = at < numel
    weight = tl.load(row + W).to(tl.pointer_type(WEIGHT)) + at
    g = tl_fp32(tl.load(tl.load(row + G).to(tl.pointer_type(GRAD)) + at, mask=live, other=0.0))
    v = tl.load(tl.load(row + Q).to(tl.pointer_type(tl.float32)) + at, mask=live, other=0.0)
    move = g * number(grad_scale, SCALED) / (tl.sqrt(v) + eps) * factor
    if MOMENT is not None:
        moment = tl.load(row + M).to(tl.pointer_type(MOMENT)) + at
        move = beta1 * tl_fp32(tl.load(moment, mask=live, other=0.0)) + rest1 * move
        tl.store(moment, tl_cast(move, MOMENT), mask=live)
    step = number(lr, LR)
    w = tl_fp32(tl.load(weight, mask=live, other=0.0))
    tl.store(weight, tl_cast((1.0 - step * weight_decay) * w - step * move, WEIGHT), mask=live)
