"""Device functions that find the k largest magnitudes of a block held as `[lanes, runs, 4]` pairs.

Magnitudes are the lower 15 bits of bf16 numbers, which order like integers. First the largest of each group of eight:
the k-th largest of these is a threshold that k elements or a few more reach, which the caller then ranks one by one.
Where far more reach it, as with many equal magnitudes, a search over all elements raises it; equal ones go by index.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optplan.optim_impls.micro_adam.pair_kernels import tl_at_least, tl_max_of_bits, tl_popcount
from optplan.optim_impls.triton_math import INTERPRETED

BOTH: tl.constexpr = tl.constexpr(0x00010001)


@triton.jit
def tl_group_maxima(magnitudes, RUNS: tl.constexpr, LANES: tl.constexpr):
    """Largest magnitudes of disjoint groups of elements, as pairs `[LANES, groups]`."""
    of_runs = tl_max_of_bits(magnitudes, 2)
    if RUNS == 1:
        return of_runs
    else:
        return tl_max_of_bits(tl.reshape(of_runs, (LANES, 2, RUNS // 2)), 1)


@triton.jit
def tl_largest(keys):
    """The largest of all halves."""
    return tl.max(tl.max(tl.maximum(keys & 0xFFFF, keys >> 16), axis=1), axis=0)


@triton.jit
def tl_smallest(keys):
    """The smallest of all halves."""
    return tl.min(tl.min(tl.minimum(keys & 0xFFFF, keys >> 16), axis=1), axis=0)


@triton.jit
def _count(keys, threshold):
    """How many halves reach the threshold. A half of all ones is -1, and lends one to the upper half."""
    ones = tl_at_least(keys, threshold * BOTH)
    if len(keys.shape) == 3:
        ones = tl.sum(ones, axis=2)
    lent = -tl.sum(tl.sum(ones, axis=1), axis=0)
    return 2 * (lent & 0xFFFF) + (lent >> 16)


@triton.jit
def tl_search(keys, low, high, count, wanted):
    """The largest threshold that at least `wanted` halves reach, or any that just so many do, and how many do.

    Args:
        keys: Pairs of magnitudes.
        low: Reached by `count` >= `wanted` halves.
        high: Reached by fewer than `wanted`.
        count: See `low`.
        wanted: How many are sought.
    """
    while (count != wanted) & (high - low > 1):
        quarter = tl.maximum((high - low) >> 2, 1)
        first, last = low + quarter, high - 1
        second = tl.minimum(first + quarter, last)
        third = tl.minimum(second + quarter, last)
        c1, c2, c3 = _count(keys, first), _count(keys, second), _count(keys, third)
        high = tl.where(c1 < wanted, first, tl.where(c2 < wanted, second, tl.where(c3 < wanted, third, high)))
        count = tl.where(c3 >= wanted, c3, tl.where(c2 >= wanted, c2, tl.where(c1 >= wanted, c1, count)))
        low = tl.where(c3 >= wanted, third, tl.where(c2 >= wanted, second, tl.where(c1 >= wanted, first, low)))
    return low, count


@triton.jit
def tl_marks(keys, threshold, RUNS: tl.constexpr):
    """One bit for each element that reaches the threshold, as two int32 `[LANES]`: the first four runs, the others.

    Word `w = 4 run + pair` of a lane has bit `w mod 16` for its lower half and the next 16th for its upper half.
    """
    run, pair = tl.arange(0, RUNS)[None, :, None], tl.arange(0, 4)[None, None, :]
    bits = tl_at_least(keys, threshold * BOTH) & (BOTH << (4 * (run & 3) + pair))
    return _merge(tl.where(run < 4, bits, 0)), _merge(tl.where(run < 4, 0, bits))


@triton.jit
def _merge(bits):
    """All bits of a lane in one; no two elements have the same. The interpreter is slow at reductions of its own."""
    if INTERPRETED:
        return tl.sum(tl.sum(bits, axis=2), axis=1)
    else:
        return tl.xor_sum(tl.xor_sum(bits, axis=2), axis=1)


@triton.jit
def tl_count_marks(first, second):
    """Marks of each lane."""
    return tl_popcount(first) + tl_popcount(second)


@triton.jit
def tl_place(use_first, bit, lane, LANES: tl.constexpr):
    """The element of a lane's mark."""
    run = tl.where(use_first, 0, 4) + ((bit & 15) >> 2)
    return (run * LANES + lane) * 8 + 2 * (bit & 3) + (bit >> 4)


@triton.jit
def _ones(count):
    return (1 << tl.minimum(tl.maximum(count, 0), 16)) - 1


@triton.jit
def _marks_up_to(place, lane, LANES: tl.constexpr):
    """The marks of all elements up to `place`."""
    ahead = place + 8 * (LANES - lane)  # from the run before the lane's first, so that it is not negative
    run, rest = ahead // (8 * LANES) - 1, tl.minimum(ahead % (8 * LANES), 7)
    lower, upper = 4 * run + (rest + 2) // 2, 4 * run + (rest + 1) // 2
    return _ones(lower) | (_ones(upper) << 16), _ones(lower - 16) | (_ones(upper - 16) << 16)


@triton.jit
def tl_break_ties(keys, threshold, first, second, lane, wanted, RUNS: tl.constexpr, LANES: tl.constexpr):
    """Leave of the elements equal to the threshold only those of the lowest indices, so that `wanted` are marked.

    Returns:
        The marks, and the last index that is marked of those equal to the threshold.
    """
    first_above, second_above = tl_marks(keys, threshold + 1, RUNS)
    needed = wanted - tl.sum(tl_count_marks(first_above, second_above), axis=0)
    first_equal, second_equal = first & ~first_above, second & ~second_above
    low, high = needed * 0 - 1, needed * 0 + RUNS * LANES * 8 - 1
    while high - low > 1:
        middle = (low + high) >> 1
        first_upto, second_upto = _marks_up_to(middle, lane, LANES)
        found = tl.sum(tl_count_marks(first_equal & first_upto, second_equal & second_upto), axis=0)
        high = tl.where(found >= needed, middle, high)
        low = tl.where(found >= needed, low, middle)
    first_upto, second_upto = _marks_up_to(high, lane, LANES)
    return first_above | (first_equal & first_upto), second_above | (second_equal & second_upto), high
