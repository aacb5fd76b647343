"""The first kernel of a step: select of each block, write the window's row, quantize the rest.

One warp takes one block and holds it in registers as [buckets, runs, 8]: a thread owns a bucket. Elements are ranked by
the bits of their magnitudes, which order like integers. Under a strict order the k largest elements lie in the k runs
with the largest maxima; so the search works on the runs' maxima first, then on the elements of k runs alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optplan.optim_impls.triton_math import (
    INTERPRETED,
    tl_bf16,
    tl_fp32,
    tl_hash,
    tl_load_scalar,
    tl_mix_seed,
    tl_pointer,
)

LARGEST_BITS: tl.constexpr = tl.constexpr(0x7E800000)  # 2^126 as a float
MAGIC: tl.constexpr = tl.constexpr(8388608.0)  # 2^23: the float whose last bit counts ones
SMALLEST_RANGE: tl.constexpr = tl.constexpr(1e-30)
COLUMNS: tl.constexpr = tl.constexpr(9)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _run_maxima(x):
    """Maxima over the last axis; NaN wins, as infinity in the interpreter, which has no such maximum."""
    if INTERPRETED:
        return tl.max(tl.where(x != x, float("inf"), x), axis=2)
    else:
        return tl.reduce(x, 2, _larger)


@triton.jit
def _magnitude_bits(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _total(x):
    """Sum of a matrix, first within threads."""
    return tl.sum(tl.sum(x, axis=1), axis=0)


@triton.jit
def _search(keys, low, high, count, wanted):
    """The largest threshold with at least `wanted` keys at or above it, and how many there are.

    Each trip tries three thresholds, whose counts of up to 1023 travel in one integer. It ends early where the count is
    exact; else `low` is a key that occurs more than once.

    Args:
        keys: int32 matrix, whose second axis lies within threads.
        low: Lower bound of the threshold, with `count` >= `wanted` keys at or above it.
        high: Upper bound, exclusive: fewer than `wanted` keys are at or above it.
        count: See `low`.
        wanted: Keys to find.
    """
    while (count != wanted) & (high - low > 1):
        quarter = tl.maximum((high - low) >> 2, 1)
        first, last = low + quarter, high - 1
        second = tl.minimum(first + quarter, last)
        third = tl.minimum(second + quarter, last)
        counts = (keys >= first).to(tl.int32) + ((keys >= second).to(tl.int32) << 10)
        counts += (keys >= third).to(tl.int32) << 20
        packed = _total(counts)
        c1, c2, c3 = packed & 1023, (packed >> 10) & 1023, packed >> 20
        high = tl.where(c1 < wanted, first, tl.where(c2 < wanted, second, tl.where(c3 < wanted, third, high)))
        count = tl.where(c3 >= wanted, c3, tl.where(c2 >= wanted, c2, tl.where(c1 >= wanted, c1, count)))
        low = tl.where(c3 >= wanted, third, tl.where(c2 >= wanted, second, tl.where(c1 >= wanted, first, low)))
    return low, count


@triton.jit
def _last_tied(keys, indices, threshold, count, wanted, size: tl.constexpr):
    """The highest index that is taken among keys equal to `threshold`; `size` if all are."""
    last = threshold * 0 + size
    if count != wanted:
        taken = wanted - _total((keys > threshold).to(tl.int32))
        tied = tl.where(keys == threshold, size - 1 - indices, -1)
        lowest, _ = _search(tied, threshold * 0 - 1, threshold * 0 + size, threshold * 0 + size, taken)
        # The search may end between two indices; what it skipped here may be tied elsewhere.
        taken_indices = tl.where((keys == threshold) & (indices < size - lowest), indices, -1)
        last = tl.max(tl.max(taken_indices, axis=1), axis=0)
    return last


@triton.jit
def _scale(low, high):
    """Scale and offset of `1 + code / 16`; the scale has 19 bits, so that its products with codes are exact."""
    scale = (((high - low) * (16.0 / 15.0)).to(tl.int32, bitcast=True) & -32).to(tl.float32, bitcast=True)
    return scale, low - scale


@triton.jit
def _accumulate(gradient, word, j, scale, offset, factor, HAS_FACTOR: tl.constexpr):
    """Gradient plus error feedback. The fma is written out: elements are computed twice and must agree bit for bit."""
    one_plus = ((((word >> (4 * j)) & 15) << 19) | 0x3F800000).to(tl.float32, bitcast=True)
    error = tl.fma(one_plus, scale, offset)
    if HAS_FACTOR:
        return tl.fma(tl_fp32(gradient), factor, error)
    else:
        return tl_fp32(gradient) + error


@triton.jit
def _load_words(codes, run, num_bytes, TAIL: tl.constexpr):
    """The eight codes of each run as an int32."""
    if TAIL:
        word = tl.zeros_like(run)
        for byte in tl.static_range(4):
            place = 4 * run + byte
            word |= tl.load(codes + place, mask=place < num_bytes, other=0).to(tl.int32) << (8 * byte)
        return word
    else:
        return tl.load(codes.to(tl.pointer_type(tl.int32)) + run)


@triton.jit
def _store_words(codes, run, word, num_bytes, TAIL: tl.constexpr):
    if TAIL:
        for byte in tl.static_range(4):
            place = 4 * run + byte
            tl.store(codes + place, ((word >> (8 * byte)) & 255).to(tl.uint8), mask=place < num_bytes)
    else:
        tl.store(codes.to(tl.pointer_type(tl.int32)) + run, word)


@triton.jit
def _round_down(x):
    """The largest bf16 value not above x, as fp32."""
    bits = x.to(tl.int32, bitcast=True)
    floor = bits & -65536
    below = (bits < 0) & ((bits & 0xFFFF) != 0)
    return tl.where(below, floor + 0x10000, floor).to(tl.float32, bitcast=True)


@triton.jit
def _encode(e, valid, noise, low, span, RUNS: tl.constexpr, BUCKETS: tl.constexpr, TAIL: tl.constexpr):
    """The codes of every run as an int32.

    Adding 2^23 after scaling by 128 x 16^h leaves the code of the h-th element of four where it belongs, in bits
    4h + 7 to 4h + 10 of the mantissa, with seven bits of fraction below.
    """
    inverse = tl.where(span > SMALLEST_RANGE, tl.div_rn(15.0, span), 0.0)
    shift = 4 * (tl.arange(0, 8) & 3)[None, None, :]
    unit = ((134 + shift) << 23).to(tl.float32, bitcast=True)
    offset = tl.fma((noise - (low * inverse)[:, None, None]), unit, MAGIC)
    levels = tl.fma(e, inverse[:, None, None] * unit, offset)
    codes = levels.to(tl.int32, bitcast=True) & (0x780 << shift)
    if TAIL:
        codes = tl.where(valid, codes, 0)
    halves = tl.sum(tl.reshape(codes, (BUCKETS, RUNS, 2, 4)), axis=3) >> 7
    return tl.sum(halves << (16 * tl.arange(0, 2))[None, None, :], axis=2)


@triton.jit
def _slots(marks):
    """The rank of each mark (0 or 1), row by row."""
    of_row = tl.sum(marks, axis=1)
    return (tl.cumsum(of_row, axis=0) - of_row)[:, None] + tl.cumsum(marks, axis=1) - 1


@triton.jit
def _gather_runs(keys, run, top, indices, num_selected, NUM_RUNS: tl.constexpr):
    """Put the k runs with the largest maxima where the row will be, thread by thread.

    Returns:
        The smallest of the maxima, and the last run taken of those that have it, `NUM_RUNS` if all are taken.
    """
    bottom = tl.min(tl.min(keys, axis=1), axis=0)
    threshold, count = _search(keys, bottom, top + 1, top * 0 + NUM_RUNS, num_selected)
    last = _last_tied(keys, run, threshold, count, num_selected, NUM_RUNS)
    chosen = ((keys > threshold) | ((keys == threshold) & (run <= last))).to(tl.int32)
    slot = _slots(chosen)
    tl.store(indices + slot, run.to(tl.int16), mask=chosen != 0)
    tl.debug_barrier()
    return threshold, last


@triton.jit
def _write_row(
    gradient, codes, minima, maxima, indices, values, factor, threshold, last_run, top, num_valid,
    num_selected, SIZE: tl.constexpr, BUCKETS: tl.constexpr, KP: tl.constexpr, HAS_FACTOR: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Write the k largest elements of the gathered runs to the row.

    Returns:
        Bits of the smallest magnitude selected, whether some elements of the block that have it are not selected, and
        the last index selected of those that have it.
    """
    entry = tl.arange(0, KP)
    run = tl.load(indices + entry, mask=entry < num_selected, other=0, cache_modifier=".cg").to(tl.int32)
    j = tl.arange(0, 8)[None, :]
    index = run[:, None] * 8 + j
    taken = (entry < num_selected)[:, None] & (index < num_valid)
    if TAIL:
        g = tl.load(gradient + index, mask=taken, other=0.0)
    else:
        g = tl.load(gradient + index)
    word = _load_words(codes, run, (num_valid + 1) // 2, TAIL)
    bucket = run % BUCKETS
    scale, offset = _scale(tl_fp32(tl.load(minima + bucket)), tl_fp32(tl.load(maxima + bucket)))
    x = _accumulate(g, word[:, None], j, scale[:, None], offset[:, None], factor, HAS_FACTOR)
    keys = tl.where(taken, _magnitude_bits(x), -1)
    found = _total((keys >= threshold).to(tl.int32))
    exact, count = _search(keys, threshold, top + 1, found, num_selected)
    last = _last_tied(keys, index, exact, count, num_selected, SIZE)
    picked = ((keys > exact) | ((keys == exact) & (index <= last))).to(tl.int32)
    slot = _slots(picked)
    tl.debug_barrier()  # the runs have been read, by all
    tl.store(indices + slot, index.to(tl.int16), mask=picked != 0)
    tl.store(values + slot, tl_bf16(x), mask=picked != 0)
    # Where each run holds one, runs that were not gathered may yet tie.
    tied_runs = (exact == threshold) & (last_run * 8 < SIZE)
    last = tl.where(count == num_selected, last_run * 8 + 7, last)
    return exact, (count != num_selected) | tied_runs, last


@triton.jit
def _write_error(
    e, codes, minima, maxima, run, place, bucket, seed, position, num_valid,
    RUNS: tl.constexpr, BUCKETS: tl.constexpr, STOCHASTIC: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Quantize what was not selected."""
    valid, used = place < num_valid, bucket * 8 < num_valid
    if TAIL:
        least, most = tl.where(valid, e, float("inf")), tl.where(valid, e, float("-inf"))
    else:
        least, most = e, e
    low = _round_down(tl.min(tl.min(least, axis=2), axis=1))
    high = -_round_down(-tl.max(tl.max(most, axis=2), axis=1))
    if TAIL:
        low, high = tl.where(used, low, 0.0), tl.where(used, high, 0.0)
    if STOCHASTIC:
        noise = (tl_hash(position + place, seed) >> 16).to(tl.int32).to(tl.float32) * (1.0 / 65536)
    else:
        noise = 0.5
    word = _encode(e, valid, noise, low, high - low, RUNS, BUCKETS, TAIL)
    _store_words(codes, run, word, (num_valid + 1) // 2, TAIL)
    tl.store(minima + bucket, tl_bf16(low), mask=used)
    tl.store(maxima + bucket, tl_bf16(high), mask=used)


@triton.jit
def _select_block(
    gradient, codes, minima, maxima, indices, values, factor, seed, position, num_valid, num_selected,
    RUNS: tl.constexpr, BUCKETS: tl.constexpr, KP: tl.constexpr, HAS_FACTOR: tl.constexpr,
    STOCHASTIC: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One block; all pointers are its own, `indices` and `values` those of the window's row."""
    NUM_RUNS: tl.constexpr = RUNS * BUCKETS
    bucket = tl.arange(0, BUCKETS)
    run = tl.arange(0, RUNS)[None, :] * BUCKETS + bucket[:, None]
    j = tl.arange(0, 8)[None, None, :]
    place = run[:, :, None] * 8 + j
    if TAIL:
        used = bucket * 8 < num_valid
        g = tl.load(gradient + place, mask=place < num_valid, other=0.0)
        low, high = tl.load(minima + bucket, mask=used, other=0.0), tl.load(maxima + bucket, mask=used, other=0.0)
    else:
        g = tl.load(gradient + place)
        low, high = tl.load(minima + bucket), tl.load(maxima + bucket)
    word = _load_words(codes, run, (num_valid + 1) // 2, TAIL)
    scale, offset = _scale(tl_fp32(low), tl_fp32(high))
    a = _accumulate(g, word[:, :, None], j, scale[:, None, None], offset[:, None, None], factor, HAS_FACTOR)
    if TAIL:
        magnitude = tl.where(place < num_valid, tl.abs(a), 0.0)
        keys = tl.where(run * 8 < num_valid, _run_maxima(magnitude).to(tl.int32, bitcast=True), -1)
    else:
        keys = _run_maxima(tl.abs(a)).to(tl.int32, bitcast=True)
    top = tl.max(tl.max(keys, axis=1), axis=0)
    if top < LARGEST_BITS:
        threshold, last_run = _gather_runs(keys, run, top, indices, num_selected, NUM_RUNS)
        exact, tied, last = _write_row(
            gradient, codes, minima, maxima, indices, values, factor, threshold, last_run, top, num_valid,
            num_selected, NUM_RUNS * 8, BUCKETS, KP, HAS_FACTOR, TAIL,
        )  # fmt: skip
        bound = exact.to(tl.float32, bitcast=True)
        e = tl.where(tl.abs(a) >= bound, 0.0, a)
        if tied:
            e = tl.where((tl.abs(a) > bound) | ((tl.abs(a) == bound) & (place <= last)), 0.0, a)
        _write_error(
            e, codes, minima, maxima, run, place, bucket, seed, position, num_valid, RUNS, BUCKETS, STOCHASTIC, TAIL
        )
    else:
        entry = tl.arange(0, KP)
        tl.store(indices + entry, tl.full((KP,), -1, tl.int16), mask=entry < num_selected)
        tl.store(values + entry, tl_bf16(tl.zeros((KP,), tl.float32)), mask=entry < num_selected)


@triton.jit(do_not_specialize=["slot", "step", "seed", "factor"])
def select_kernel(
    rows, chunk_offset, chunk_row, factor, seed, step, slot,
    RUNS: tl.constexpr, BUCKETS: tl.constexpr, WINDOW: tl.constexpr, SELECTED: tl.constexpr, KP: tl.constexpr,
    NUMERATOR: tl.constexpr, DENOMINATOR: tl.constexpr, G_DTYPE: tl.constexpr, FACTOR: tl.constexpr,
    STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Accumulate, select and quantize every full block of a batch, or the short block of each tensor if `TAIL`.

    The masks of short blocks cost registers, so that they have a launch of their own, with a program for each tensor.

    Args:
        rows: The launch table: parameter, gradient, error feedback, its minima and maxima, window indices and values.
        chunk_offset: First element of each chunk.
        chunk_row: Tensor of each chunk.
        factor: Of the gradients: none if `FACTOR` is 0, a number if 1, a pointer to one if 2.
        seed: Of stochastic rounding.
        step: Number of this step.
        slot: Row of the window to write.
        RUNS: Runs of eight elements of a bucket.
        BUCKETS: Buckets of a block.
        WINDOW: Rows of the window.
        SELECTED: Elements selected of a full block.
        KP: `SELECTED` rounded up to a power of two, at least a warp.
        NUMERATOR: Of the density, which decides for short blocks.
        DENOMINATOR: See `NUMERATOR`.
    """
    SIZE: tl.constexpr = RUNS * BUCKETS * 8
    if TAIL:
        row = tl.program_id(0).to(tl.int64)
        numel = tl.load(rows + row * COLUMNS + 7)
        first = numel // SIZE * SIZE
        left = (numel - first).to(tl.int32)
        selected = tail_selected(left, NUMERATOR, DENOMINATOR)
        takes_part = left > 0
    else:
        chunk = tl.program_id(0) // (CHUNK // SIZE)
        row = tl.load(chunk_row + chunk).to(tl.int64)
        numel = tl.load(rows + row * COLUMNS + 7)
        first = tl.load(chunk_offset + chunk) + (tl.program_id(0) % (CHUNK // SIZE)) * SIZE
        left, selected = SIZE, SELECTED
        takes_part = first + SIZE <= numel
    if takes_part:
        block = first // SIZE
        gradient = tl_pointer(rows, row, 1, COLUMNS, G_DTYPE, ALIGNED) + tl.multiple_of(first, 16)
        codes = tl_pointer(rows, row, 2, COLUMNS, tl.uint8, ALIGNED) + tl.multiple_of(first // 2, 16)
        minima = tl_pointer(rows, row, 3, COLUMNS, tl.bfloat16, ALIGNED) + block * BUCKETS
        maxima = tl_pointer(rows, row, 4, COLUMNS, tl.bfloat16, ALIGNED) + block * BUCKETS
        window = block * (WINDOW * SELECTED) + slot * selected
        indices = tl_pointer(rows, row, 5, COLUMNS, tl.int16, ALIGNED) + window
        values = tl_pointer(rows, row, 6, COLUMNS, tl.bfloat16, ALIGNED) + window
        key = seed
        if STOCHASTIC:
            key = tl_mix_seed(seed, step, tl.load(rows + row * COLUMNS + 8).to(tl.int32))
        _select_block(
            gradient, codes, minima, maxima, indices, values, tl_load_scalar(factor, FACTOR == 2),
            key, first, left, selected, RUNS, BUCKETS, KP, FACTOR != 0, STOCHASTIC, TAIL,
        )  # fmt: skip


@triton.jit
def tail_selected(left, NUMERATOR: tl.constexpr, DENOMINATOR: tl.constexpr):
    """Elements selected of a short block of `left`, as the planner's `select` has it."""
    return ((left.to(tl.int64) * NUMERATOR + (DENOMINATOR - 1)) // DENOMINATOR).to(tl.int32)
