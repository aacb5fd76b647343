"""The first kernel of a step: select of each block, write the window's row, quantize the rest.

One warp takes one block and holds it in registers as pairs `[lanes, runs, 4]`; run `r` of eight elements belongs to
lane `r mod lanes`, so that a lane owns whole buckets or shares one with few others. All arithmetic is bf16's, two
elements an instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optplan.optim_impls.micro_adam.error_kernels import (
    tl_error,
    tl_load_gradient,
    tl_reload,
    tl_spread_ranges,
    tl_unit,
    tl_write_error,
)
from optplan.optim_impls.micro_adam.pair_kernels import (
    MAGNITUDES,
    tl_add_pairs,
    tl_at_least,
    tl_popcount,
    tl_spread_codes,
    tl_twice,
)
from optplan.optim_impls.micro_adam.scratchpad_kernels import tl_get, tl_put, tl_scratchpad
from optplan.optim_impls.micro_adam.threshold_kernels import (
    BOTH,
    tl_break_ties,
    tl_count_marks,
    tl_group_maxima,
    tl_largest,
    tl_marks,
    tl_place,
    tl_search,
    tl_smallest,
)
from optplan.optim_impls.triton_math import tl_bf16, tl_fp32, tl_load_scalar, tl_mix_seed, tl_pointer

LARGEST_BITS: tl.constexpr = tl.constexpr(0x7B80)  # 2^120 in bf16
NUM_LISTS: tl.constexpr = tl.constexpr(7)  # pointers of a table row, without the step counter of a capturable one
UNRANKED: tl.constexpr = tl.constexpr(-0x407F4080)  # -1 twice: no element at all, below every threshold


@triton.jit
def _compact(pad, first, second, lane, LANES: tl.constexpr):
    """Write the indices of all marked elements to the scratchpad, in the order of lanes."""
    counts = tl_count_marks(first, second)
    slot = tl.cumsum(counts, axis=0) - counts
    left = tl.max(counts, axis=0)
    while left > 0:
        use_first = first != 0
        marks = tl.where(use_first, first, second)
        lowest = marks & -marks
        place = tl_place(use_first, tl_popcount(lowest - 1), lane, LANES)
        tl_put(pad, slot, place, marks != 0)
        first = tl.where(use_first, first ^ lowest, first)
        second = tl.where(use_first, second, second ^ lowest)
        slot += 1
        left -= 1
    tl.debug_barrier()


@triton.jit
def _ranks(pad, keys, CAPACITY: tl.constexpr):
    """How many keys are larger than each."""
    entry = tl.arange(0, CAPACITY)
    tl.debug_barrier()
    tl_put(pad, entry, keys, entry >= 0)
    tl.debug_barrier()
    others = tl_get(pad, entry[:, None] + tl.zeros((1, CAPACITY), tl.int32), entry[:, None] >= 0)
    # The sign of a difference, as comparisons would be gathered bit by bit; keys are too small to overflow.
    return tl.sum((keys[None, :] - others).to(tl.uint32, bitcast=True) >> 31, axis=0).to(tl.int32)


@triton.jit
def _write_row(
    pad, gradient, codes, minima, maxima, indices, values, factor, count, wanted,
    CAPACITY: tl.constexpr, BUCKETS: tl.constexpr, HAS_FACTOR: tl.constexpr,
):  # fmt: skip
    """Write the largest of the elements in the scratchpad to the row, the largest first.

    Returns:
        The smallest key that was written and the largest that was not, -1 if all were. A key is the magnitude and below
        it what the index lacks of 16 ones, so that none is there twice.
    """
    entry = tl.arange(0, CAPACITY)
    taken = entry < count
    place = tl.where(taken, tl_get(pad, entry, taken), 0)
    a = tl_reload(gradient, codes, minima, maxima, place, taken, factor, BUCKETS, HAS_FACTOR)
    keys = tl.where(taken, ((a & 0x7FFF) << 16) | (0xFFFF - place), -1)
    rank = _ranks(pad, keys, CAPACITY)
    selected = rank < wanted
    tl.store(indices + rank, place.to(tl.int16), mask=selected)
    tl.store(values + rank, a.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=selected)
    return tl.max(tl.where(rank == wanted - 1, keys, -1), axis=0), tl.max(tl.where(selected, -1, keys), axis=0)


@triton.jit
def _residual(a, ranked, run, bound, tied, last):
    """What is not selected; zero elsewhere.

    Args:
        a: Pairs.
        ranked: Their magnitudes.
        run: The run of each.
        bound: Smallest magnitude selected.
        tied: Whether some of that magnitude are not selected.
        last: Index up to which those of that magnitude are selected, if `tied`.
    """
    kept = a & ~tl_at_least(ranked, bound * BOTH)
    if tied:
        place = run * 8 + 2 * tl.arange(0, 4)[None, None, :]
        bounds = bound * BOTH + tl.where(place > last, 1, 0) + tl.where(place >= last, 0x10000, 0)
        kept = a & ~tl_at_least(ranked, bounds)
    return kept


@triton.jit
def _select_block(
    pad, gradient, codes, minima, maxima, indices, values, factor, seed, position, num_valid, wanted,
    RUNS: tl.constexpr, LANES: tl.constexpr, BUCKETS: tl.constexpr, CAPACITY: tl.constexpr, PAIRED: tl.constexpr,
    HAS_FACTOR: tl.constexpr, STOCHASTIC: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One block; all pointers are its own, `indices` and `values` those of the window's row."""
    NUM_GROUPS: tl.constexpr = LANES * max(RUNS, 2)
    lane, bucket = tl.arange(0, LANES), tl.arange(0, BUCKETS)
    run2 = tl.arange(0, RUNS)[None, :] * LANES + lane[:, None]
    run = run2[:, :, None]
    g = tl_load_gradient(gradient, run, num_valid, factor, RUNS, LANES, PAIRED, HAS_FACTOR, TAIL)
    if TAIL:
        used = bucket * 8 < num_valid
        word = tl.load(codes + run2, mask=run2 * 8 < num_valid, other=0)
        low = tl.load(minima + bucket, mask=used, other=0.0)
        high = tl.load(maxima + bucket, mask=used, other=0.0)
    else:
        word = tl.load(codes + run2)
        low, high = tl.load(minima + bucket), tl.load(maxima + bucket)
    old_low, old_high = tl_spread_ranges(tl_fp32(low), LANES, BUCKETS), tl_spread_ranges(tl_fp32(high), LANES, BUCKETS)
    unit, minus = tl_unit(old_low, old_high)
    a = tl_add_pairs(g, tl_error(tl_spread_codes(word[:, :, None]), unit, minus, tl_twice(old_low)))
    if TAIL:
        place = run * 8 + 2 * tl.arange(0, 4)[None, None, :]
        valid = tl.where(place < num_valid, 0xFFFF, 0) | tl.where(place + 1 < num_valid, -65536, 0)
        a = a & valid
        ranked = (a & MAGNITUDES) | (UNRANKED & ~valid)
    else:
        ranked = a & MAGNITUDES
    maxima_of_groups = tl_group_maxima(a & MAGNITUDES, RUNS, LANES)
    top = tl_largest(maxima_of_groups)
    if top < LARGEST_BITS:
        bottom = tl_smallest(maxima_of_groups)
        threshold, _ = tl_search(maxima_of_groups, bottom, top + 1, top * 0 + NUM_GROUPS, wanted)
        first, second = tl_marks(ranked, threshold, RUNS)
        count = tl.sum(tl_count_marks(first, second), axis=0)
        last, tied = top * 0, top < 0
        if count > 2 * CAPACITY:
            threshold, count = tl_search(ranked, threshold, top + 1, count, wanted)
            first, second = tl_marks(ranked, threshold, RUNS)
            if count > 2 * CAPACITY:
                first, second, last = tl_break_ties(ranked, threshold, first, second, lane, wanted, RUNS, LANES)
                count, tied = wanted, top >= 0
        _compact(pad, first, second, lane, LANES)
        row = (pad, gradient, codes, minima, maxima, indices, values, factor, count, wanted)
        if count > CAPACITY:
            smallest, left_out = _write_row(*row, 2 * CAPACITY, BUCKETS, HAS_FACTOR)
        else:
            smallest, left_out = _write_row(*row, CAPACITY, BUCKETS, HAS_FACTOR)
        if left_out >> 16 == smallest >> 16:
            last, tied = 0xFFFF - (smallest & 0xFFFF), top >= 0
        e = _residual(a, ranked, run, smallest >> 16, tied, last)
        tl_write_error(e, codes, minima, maxima, run, seed, position, num_valid, RUNS, LANES, BUCKETS, STOCHASTIC, TAIL)
    else:
        entry = tl.arange(0, CAPACITY)
        tl.store(indices + entry, tl.full((CAPACITY,), -1, tl.int16), mask=entry < wanted)
        tl.store(values + entry, tl_bf16(tl.zeros((CAPACITY,), tl.float32)), mask=entry < wanted)


@triton.jit(do_not_specialize=["slot", "step", "seed", "factor"])
def select_kernel(
    rows, chunk_offset, chunk_row, scratch, factor, seed, step, slot,
    RUNS: tl.constexpr, LANES: tl.constexpr, BUCKETS: tl.constexpr, WINDOW: tl.constexpr, SELECTED: tl.constexpr,
    CAPACITY: tl.constexpr, NUMERATOR: tl.constexpr, DENOMINATOR: tl.constexpr, G_DTYPE: tl.constexpr,
    FACTOR: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr,
    PAD: tl.constexpr, CAPTURABLE: tl.constexpr,
):  # fmt: skip
    """Accumulate, select and quantize every full block of a batch, or the short block of each tensor if `TAIL`.

    The masks of short blocks cost registers, so that they have a launch of their own, with a program for each tensor.

    Args:
        rows: The launch table: parameter, gradient, error feedback, its minima and maxima, window indices and values.
        chunk_offset: First element of each chunk.
        chunk_row: Tensor of each chunk.
        scratch: int32 `[programs, 2 CAPACITY]` for the interpreter.
        factor: Of the gradients: none if `FACTOR` is 0, a number if 1, a pointer to one if 2.
        seed: Of stochastic rounding.
        step: Number of this step.
        slot: Row of the window to write.
        RUNS: Runs of eight elements that a lane holds.
        LANES: Lanes of a block.
        BUCKETS: Buckets of a block.
        WINDOW: Rows of the window.
        SELECTED: Elements selected of a full block.
        CAPACITY: Elements that are ranked at once, a power of two above `SELECTED`; now and then twice as many.
        NUMERATOR: Of the density, which decides for short blocks.
        DENOMINATOR: See `NUMERATOR`.
        PAD: PTX that declares the scratchpad.
        CAPTURABLE: Whether step and slot follow from the tensor's counter, which is in its row of the table.
    """
    SIZE: tl.constexpr = RUNS * LANES * 8
    COLUMNS: tl.constexpr = NUM_LISTS + CAPTURABLE + 2
    if TAIL:
        row = tl.program_id(0).to(tl.int64)
        numel = tl.load(rows + row * COLUMNS + COLUMNS - 2)
        first = numel // SIZE * SIZE
        left = (numel - first).to(tl.int32)
        selected = tail_selected(left, NUMERATOR, DENOMINATOR)
        takes_part = left > 0
    else:
        chunk = tl.program_id(0) // (CHUNK // SIZE)
        row = tl.load(chunk_row + chunk).to(tl.int64)
        numel = tl.load(rows + row * COLUMNS + COLUMNS - 2)
        first = tl.load(chunk_offset + chunk) + (tl.program_id(0) % (CHUNK // SIZE)) * SIZE
        left, selected = SIZE, SELECTED
        takes_part = first + SIZE <= numel
    if takes_part:
        if CAPTURABLE:
            step = tl.load(tl_pointer(rows, row, NUM_LISTS, COLUMNS, tl.float32, False)).to(tl.int32)
            slot = (step - 1) % WINDOW
        block = first // SIZE
        gradient = tl_pointer(rows, row, 1, COLUMNS, G_DTYPE, ALIGNED) + tl.multiple_of(first, 16)
        # Nothing is said of this pointer's alignment: a lane is to load single words, in the layout of its pairs.
        codes = tl_pointer(rows, row, 2, COLUMNS, tl.int32, False) + first // 8
        minima = tl_pointer(rows, row, 3, COLUMNS, tl.bfloat16, False) + block * BUCKETS
        maxima = tl_pointer(rows, row, 4, COLUMNS, tl.bfloat16, False) + block * BUCKETS
        window = block * (WINDOW * SELECTED) + slot * selected
        indices = tl_pointer(rows, row, 5, COLUMNS, tl.int16, False) + window
        values = tl_pointer(rows, row, 6, COLUMNS, tl.bfloat16, False) + window
        key = seed
        if STOCHASTIC:
            key = tl_mix_seed(seed, step, tl.load(rows + row * COLUMNS + COLUMNS - 1).to(tl.int32))
        paired: tl.constexpr = tl.bfloat16 == G_DTYPE and ALIGNED and FACTOR == 0 and not TAIL
        _select_block(
            tl_scratchpad(scratch, PAD, 2 * CAPACITY), gradient, codes, minima, maxima, indices, values,
            tl_load_scalar(factor, FACTOR == 2), key, first, left, selected,
            RUNS, LANES, BUCKETS, CAPACITY, paired, FACTOR != 0, STOCHASTIC, TAIL,
        )  # fmt: skip


@triton.jit
def tail_selected(left, NUMERATOR: tl.constexpr, DENOMINATOR: tl.constexpr):
    """Elements selected of a short block of `left`, as the planner's `select` has it."""
    return ((left.to(tl.int64) * NUMERATOR + (DENOMINATOR - 1)) // DENOMINATOR).to(tl.int32)
