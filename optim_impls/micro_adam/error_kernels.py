"""Device functions for the error feedback: levels of 4-bit codes added to the gradient, what is left put into codes."""

from __future__ import annotations

import triton
import triton.language as tl

from optplan.optim_impls.micro_adam.pair_kernels import (
    tl_add_pairs,
    tl_fma_pairs,
    tl_lower,
    tl_max_of_pairs,
    tl_min_of_pairs,
    tl_pair,
    tl_subtract_pairs,
    tl_twice,
    tl_upper,
)
from optplan.optim_impls.micro_adam.threshold_kernels import BOTH
from optplan.optim_impls.triton_math import tl_bf16, tl_fp32, tl_hash

SMALLEST_RANGE: tl.constexpr = tl.constexpr(1e-30)
BIASES: tl.constexpr = tl.constexpr(0x43004300)  # 128 twice: the bf16 numbers whose last bit counts ones
CODE_BIASES: tl.constexpr = tl.constexpr((0x43004300 * 0x1111 + 2**31) % 2**32 - 2**31)


@triton.jit
def tl_unit(low, high):
    """The step of a bucket's levels as bf16, and what takes 128 of them away."""
    unit = tl_lower(tl_twice((high - low) * (1.0 / 15.0)))
    return tl_twice(unit), tl_twice(-128.0 * unit)


@triton.jit
def tl_error(codes, unit, minus, low):
    """The error feedback, all pairs; `codes` are 128 + code, `unit` and `minus` those of `tl_unit`."""
    return tl_add_pairs(tl_fma_pairs(codes, unit, minus), low)


@triton.jit
def tl_load_gradient(
    gradient, run, num_valid, factor, RUNS: tl.constexpr, LANES: tl.constexpr,
    PAIRED: tl.constexpr, HAS_FACTOR: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The gradient as pairs; 0 where there is none."""
    if PAIRED:
        return tl.load(gradient.to(tl.pointer_type(tl.int32)) + (run * 4 + tl.arange(0, 4)[None, None, :]))
    else:
        place = run * 8 + tl.arange(0, 8)[None, None, :]
        if TAIL:
            x = tl_fp32(tl.load(gradient + place, mask=place < num_valid, other=0.0))
        else:
            x = tl_fp32(tl.load(gradient + place))
        if HAS_FACTOR:
            x = x * factor
        lower, upper = tl.split(tl.reshape(x, (LANES, RUNS, 4, 2)))
        return tl_pair(lower, upper)


@triton.jit
def tl_reload(gradient, codes, minima, maxima, place, taken, factor, BUCKETS: tl.constexpr, HAS_FACTOR: tl.constexpr):
    """The accumulated gradient of single elements, bit by bit as in the block, as pairs of a number and itself."""
    x = tl_fp32(tl.load(gradient + place, mask=taken, other=0.0))
    if HAS_FACTOR:
        x = x * factor
    return tl_add_pairs(tl_twice(x), tl_reload_error(codes, minima, maxima, place, taken, BUCKETS))


@triton.jit
def tl_reload_error(codes, minima, maxima, place, taken, BUCKETS: tl.constexpr):
    """The error feedback of single elements, bit by bit as in the block, as pairs of a number and itself."""
    run, j = place // 8, place % 8
    word = tl.load(codes + run, mask=taken, other=0)
    code = (word >> (4 * (j >> 1) + 16 * (j & 1))) & 15
    low = tl_fp32(tl.load(minima + run % BUCKETS, mask=taken, other=0.0))
    high = tl_fp32(tl.load(maxima + run % BUCKETS, mask=taken, other=0.0))
    unit, minus = tl_unit(low, high)
    return tl_error(code * BOTH + BIASES, unit, minus, tl_twice(low))


@triton.jit
def _range(e, LANES: tl.constexpr, BUCKETS: tl.constexpr):
    """Smallest and largest of each bucket, fp32 `[BUCKETS]`."""
    least, most = tl_min_of_pairs(tl_min_of_pairs(e, 2), 1), tl_max_of_pairs(tl_max_of_pairs(e, 2), 1)
    low, high = tl.minimum(tl_lower(least), tl_upper(least)), tl.maximum(tl_lower(most), tl_upper(most))
    if LANES > BUCKETS:
        low = tl.min(tl.reshape(low, (LANES // BUCKETS, BUCKETS)), axis=0)
        high = tl.max(tl.reshape(high, (LANES // BUCKETS, BUCKETS)), axis=0)
    return low, high


@triton.jit
def tl_spread_ranges(x, LANES: tl.constexpr, BUCKETS: tl.constexpr):
    """A number of each bucket for each lane, `[LANES, 1, 1]`."""
    if LANES > BUCKETS:
        x = tl.reshape(tl.broadcast_to(x[None, :], (LANES // BUCKETS, BUCKETS)), (LANES,))
    return x[:, None, None]


@triton.jit
def _encode(e, low, span, noise_seed, position, run, STOCHASTIC: tl.constexpr):
    """The eight codes of each run as an int32 `[LANES, RUNS]`.

    Adding 128 leaves the code in the last bits of a bf16 number. Four such in a row, 4 bits apart, make the word; what
    their upper bits add to it is the same for all.
    """
    inverse = tl.where(span > SMALLEST_RANGE, tl.div_rn(15.0, span), 0.0)
    above = tl_subtract_pairs(e, tl_twice(low))
    pair = tl.arange(0, 4)[None, None, :]
    if STOCHASTIC:
        rounded = tl_lower(tl_twice(inverse))
        place = position + run * 8 + 2 * pair
        lower = tl_lower(above) * rounded + _noise(place, noise_seed)
        upper = tl_upper(above) * rounded + _noise(place + 1, noise_seed)
        codes = tl.minimum(lower.to(tl.int32), 15) | (tl.minimum(upper.to(tl.int32), 15) << 16)
        return tl.sum(codes << (4 * pair), axis=2)
    else:
        codes = tl_fma_pairs(above, tl_twice(inverse), tl.full(above.shape, BIASES, tl.int32))
        return tl.sum(codes << (4 * pair), axis=2) - CODE_BIASES


@triton.jit
def _noise(place, seed):
    return (tl_hash(place, seed) >> 16).to(tl.int32).to(tl.float32) * (1.0 / 65536)


@triton.jit
def tl_write_error(
    e, codes, minima, maxima, run, seed, position, num_valid,
    RUNS: tl.constexpr, LANES: tl.constexpr, BUCKETS: tl.constexpr, STOCHASTIC: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Quantize what was not selected."""
    low, high = _range(e, LANES, BUCKETS)
    if TAIL:
        low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
    wide = tl_spread_ranges(low, LANES, BUCKETS)
    word = _encode(e, wide, tl_spread_ranges(high, LANES, BUCKETS) - wide, seed, position, run, STOCHASTIC)
    bucket = tl.arange(0, BUCKETS)
    first = tl.reshape(run, (LANES, RUNS)) * 8
    words = codes + first // 8
    if TAIL:
        left = tl.minimum(tl.maximum(num_valid - first, 0), 8)
        of_elements = ((1 << 4 * ((left + 1) // 2)) - 1) | (((1 << 4 * (left // 2)) - 1) << 16)
        tl.store(words, word & of_elements, mask=left > 0)
        tl.store(minima + bucket, tl_bf16(low), mask=bucket * 8 < num_valid)
        tl.store(maxima + bucket, tl_bf16(high), mask=bucket * 8 < num_valid)
    else:
        tl.store(words, word)
        tl.store(minima + bucket, tl_bf16(low))
        tl.store(maxima + bucket, tl_bf16(high))
