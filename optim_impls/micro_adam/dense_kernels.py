"""Device functions that change every parameter of a block: weight decay, and error feedback in the update.

A mask would make every access scalar, so that full blocks have none.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optplan.optim_impls.micro_adam.error_kernels import tl_error, tl_spread_ranges, tl_unit
from optplan.optim_impls.micro_adam.pair_kernels import tl_lower, tl_spread_codes, tl_twice, tl_upper
from optplan.optim_impls.triton_math import tl_bf16, tl_cast, tl_fp32


@triton.jit
def tl_shrink(parameter, num_valid, decay, SIZE: tl.constexpr, P_DTYPE: tl.constexpr):
    """Weight decay of all parameters of a block; other lanes' reads of them come before."""
    place = tl.arange(0, SIZE)
    if num_valid == SIZE:
        old = tl.load(parameter + place)
        tl.debug_barrier()
        tl.store(parameter + place, tl_cast(decay * tl_fp32(old), P_DTYPE))
    else:
        old = tl.load(parameter + place, mask=place < num_valid)
        tl.debug_barrier()
        tl.store(parameter + place, tl_cast(decay * tl_fp32(old), P_DTYPE), mask=place < num_valid)


@triton.jit
def tl_densify(
    parameter, error, num_valid, lr, decay, alpha, rest,
    RUNS: tl.constexpr, LANES: tl.constexpr, BUCKETS: tl.constexpr, P_DTYPE: tl.constexpr,
):  # fmt: skip
    """Weight decay and a part of the error feedback for all parameters of a block; the rest of it stays left over.

    Args:
        parameter: Pointer to the block's first.
        error: Pointers to the block's codes, minima and maxima.
        num_valid: Elements of the block.
        lr: Learning rate.
        decay: What weight decay leaves of a parameter.
        alpha: Part of the error feedback that enters the update.
        rest: What it leaves: the codes stay, and the ends of their ranges are multiplied by it.
        RUNS: Runs of eight elements that a lane holds.
        LANES: Lanes of a block.
        BUCKETS: Buckets of a block.
        P_DTYPE: Of the parameters.
    """
    if num_valid == RUNS * LANES * 8:
        _densify(parameter, *error, num_valid, lr, decay, alpha, rest, RUNS, LANES, BUCKETS, P_DTYPE, False)
    else:
        _densify(parameter, *error, num_valid, lr, decay, alpha, rest, RUNS, LANES, BUCKETS, P_DTYPE, True)


@triton.jit
def _densify(
    parameter, codes, minima, maxima, num_valid, lr, decay, alpha, rest,
    RUNS: tl.constexpr, LANES: tl.constexpr, BUCKETS: tl.constexpr, P_DTYPE: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    run = tl.arange(0, RUNS)[None, :] * LANES + tl.arange(0, LANES)[:, None]
    place, bucket = run[:, :, None] * 8 + tl.arange(0, 8)[None, None, :], tl.arange(0, BUCKETS)
    if TAIL:
        used, taken = bucket * 8 < num_valid, place < num_valid
        word = tl.load(codes + run, mask=run * 8 < num_valid, other=0)
        low = tl_fp32(tl.load(minima + bucket, mask=used, other=0.0))
        high = tl_fp32(tl.load(maxima + bucket, mask=used, other=0.0))
        old = tl.load(parameter + place, mask=taken, other=0.0)
    else:
        used, taken = None, None
        word = tl.load(codes + run)
        low, high = tl_fp32(tl.load(minima + bucket)), tl_fp32(tl.load(maxima + bucket))
        old = tl.load(parameter + place)
    wide = tl_spread_ranges(low, LANES, BUCKETS)
    unit, minus = tl_unit(wide, tl_spread_ranges(high, LANES, BUCKETS))
    pairs = tl_error(tl_spread_codes(word[:, :, None]), unit, minus, tl_twice(wide))
    error = tl.reshape(tl.join(tl_lower(pairs), tl_upper(pairs)), (LANES, RUNS, 8))
    new = decay * tl_fp32(old) - lr * (alpha * error)
    tl.debug_barrier()  # other lanes have read what is written now
    tl.store(parameter + place, tl_cast(new, P_DTYPE), mask=taken)
    tl.store(minima + bucket, tl_bf16(rest * low), mask=used)
    tl.store(maxima + bucket, tl_bf16(rest * high), mask=used)
