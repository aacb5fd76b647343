"""The second kernel of a step: rebuild the moments of the selected coordinates from the window, update them.

One warp takes one block. A bitmap of the coordinates in its window, in the scratchpad, gives each of them a rank, in
ascending order: as many as the bitmap has marks before it. So the sums need room for what the window holds alone, and
a parameter is read and written once, beside its neighbours. The window's rows are added oldest first; a row names a
coordinate once, so that plain reads and writes with a barrier between rows need no atomics and give the same sums in
every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optplan.optim_impls.micro_adam.dense_kernels import tl_densify, tl_shrink
from optplan.optim_impls.micro_adam.error_kernels import tl_reload_error
from optplan.optim_impls.micro_adam.pair_kernels import tl_lower, tl_popcount
from optplan.optim_impls.micro_adam.prefetch_kernels import tl_prefetch
from optplan.optim_impls.micro_adam.scratchpad_kernels import (
    tl_get,
    tl_get_two,
    tl_put,
    tl_put_bits,
    tl_put_two,
    tl_scratchpad,
)
from optplan.optim_impls.micro_adam.select_kernels import NUM_LISTS, tail_selected
from optplan.optim_impls.triton_math import tl_cast, tl_fp32, tl_load_scalar, tl_pointer


@triton.jit
def _row(matrix, rows, t):
    """Row `t` of a matrix whose first axis lies within threads: no instruction at all."""
    return tl.sum(tl.where(rows == t, matrix, 0), axis=0)


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _rank(pad, index, live, SIZE: tl.constexpr):
    """The rank of each live coordinate, and how many there are: marks of the bitmap, summed word by word."""
    word = tl.arange(0, SIZE // 32)
    everywhere = word >= 0
    tl_put_two(pad, 2 * word, word * 0, word * 0, everywhere)
    tl.debug_barrier()
    tl_put_bits(pad, 2 * (index >> 5), 1 << (index & 31), live)
    tl.debug_barrier()
    counts = tl_popcount(tl_get(pad, 2 * word, everywhere))
    tl_put(pad, 2 * word + 1, tl.cumsum(counts, axis=0) - counts, everywhere)
    tl.debug_barrier()
    marks, before = tl_get_two(pad, 2 * (index >> 5), live)
    return before + tl_popcount(marks & ((1 << (index & 31)) - 1)), tl.sum(counts, axis=0)


@triton.jit
def _add_rows(pad, start, rank, live, first, second, time, num_ranks, WINDOW: tl.constexpr, CAPACITY: tl.constexpr):
    """Sum over the rows for each rank, from word `start` of the scratchpad."""
    slot = tl.arange(0, CAPACITY)
    tl_put_two(pad, start + 2 * slot, slot * 0, slot * 0, slot < num_ranks)
    tl.debug_barrier()
    for t in tl.static_range(WINDOW):
        at, alive = _row(rank, time, t), _row(live.to(tl.int32), time, t) != 0
        sum1, sum2 = tl_get_two(pad, start + 2 * at, alive)
        sum1, sum2 = _float(sum1) + _row(first, time, t), _float(sum2) + _row(second, time, t)
        tl_put_two(pad, start + 2 * at, _bits(sum1), _bits(sum2), alive)
        tl.debug_barrier()


@triton.jit
def _update_block(
    pad, parameter, error, indices, values, slot, filled, num_valid, num_selected,
    lr, decay, log2_beta1, log2_beta2, correction1, correction2, eps, alpha, rest,
    RUNS: tl.constexpr, LANES: tl.constexpr, BUCKETS: tl.constexpr, WINDOW: tl.constexpr, WP: tl.constexpr,
    KP: tl.constexpr, CAPACITY: tl.constexpr, P_DTYPE: tl.constexpr, DECAY: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """One block; all pointers are its own. The scratchpad: bitmap and ranks, coordinates by rank, sums by rank."""
    SIZE: tl.constexpr = RUNS * LANES * 8
    time = tl.arange(0, WP)[:, None]  # the oldest row is 0, the newest WINDOW - 1
    entry = tl.arange(0, KP)[None, :]
    age = WINDOW - 1 - time
    row = slot + 1 + time
    row = tl.where(row >= WINDOW, row - WINDOW, row)
    place = row * num_selected + entry
    live = (age >= 0) & (age < filled) & (entry < num_selected)
    index = tl.load(indices + place, mask=live, other=-1).to(tl.int32)
    value = tl_fp32(tl.load(values + place, mask=live, other=0.0))
    took_part = tl.max(_row(index, time, WINDOW - 1), axis=0) >= 0
    if took_part:
        live = live & (index >= 0)
        index = tl.where(live, index, 0)
        rank, num_ranks = _rank(pad, index, live, SIZE)
        weight = age.to(tl.float32)
        first, second = tl.exp2(weight * log2_beta1) * value, tl.exp2(weight * log2_beta2) * (value * value)
        # What is read for entries that are none must be nothing that is written meanwhile: the pad's first words.
        rank = tl.where(live, rank, -(SIZE // 32 + CAPACITY // 2))
        tl_put(pad, SIZE // 16 + rank, index, live)
        _add_rows(pad, SIZE // 16 + CAPACITY, rank, live, first, second, time, num_ranks, WINDOW, CAPACITY)
        ranks = tl.arange(0, CAPACITY)
        alive = ranks < num_ranks
        at = tl.where(alive, tl_get(pad, SIZE // 16 + ranks, alive), 0)
        sum1, sum2 = tl_get_two(pad, SIZE // 16 + CAPACITY + 2 * ranks, alive)
        old = tl_fp32(tl.load(parameter + at, mask=alive, other=0.0))
        update = (correction1 * _float(sum1)) / (tl.sqrt(correction2 * _float(sum2)) + eps)
        update = tl.where(_float(sum1) == 0, 0.0, update)  # also with an eps of zero
        if DENSE:
            update += alpha * tl_lower(tl_reload_error(*error, at, alive, BUCKETS))
            tl_densify(parameter, error, num_valid, lr, decay, alpha, rest, RUNS, LANES, BUCKETS, P_DTYPE)
            tl.debug_barrier()
        elif DECAY:
            tl_shrink(parameter, num_valid, decay, SIZE, P_DTYPE)
            tl.debug_barrier()
        tl.store(parameter + at, tl_cast(decay * old - lr * update, P_DTYPE), mask=alive)


@triton.jit
def _correction(numerator, log2_beta, age):
    """In fp64: 1 - beta^age loses its digits in fp32 while beta^age is near 1."""
    exponent = age.to(tl.float64) * log2_beta * 0.6931471805599453
    return (numerator / (1.0 - tl.exp(exponent))).to(tl.float32)


@triton.jit(
    do_not_specialize=[
        "slot", "filled", "lr", "weight_decay", "decay",
        "log2_beta1", "log2_beta2", "correction1", "correction2", "eps", "alpha", "rest",
    ]
)  # fmt: skip
def update_kernel(
    rows, chunk_offset, chunk_row, scratch, slot, filled,
    lr, weight_decay, decay, log2_beta1, log2_beta2, correction1, correction2, eps, alpha, rest,
    RUNS: tl.constexpr, LANES: tl.constexpr, BUCKETS: tl.constexpr, WINDOW: tl.constexpr, WP: tl.constexpr,
    SELECTED: tl.constexpr, KP: tl.constexpr, CAPACITY: tl.constexpr, NUMERATOR: tl.constexpr,
    DENOMINATOR: tl.constexpr, P_DTYPE: tl.constexpr, DECAY: tl.constexpr, DENSE: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, PAD: tl.constexpr, CAPTURABLE: tl.constexpr, LR_ON_DEVICE: tl.constexpr, FULL: tl.constexpr,
    BULK: tl.constexpr,
):  # fmt: skip
    """Update every block of a batch.

    Args:
        rows: The launch table, as in `select_kernel`.
        chunk_offset: First element of each chunk.
        chunk_row: Tensor of each chunk.
        scratch: int32 `[programs, SIZE / 16 + 3 CAPACITY]` for the interpreter.
        slot: Newest row of the window.
        filled: Rows written so far.
        decay: What weight decay leaves of a parameter.
        alpha: Part of the error feedback that enters the update, if `DENSE`.
        rest: What it leaves of the error feedback.
        RUNS: Runs of eight elements that a lane holds, if all parameters change.
        LANES: Lanes of a block.
        BUCKETS: Buckets of a block.
        WP: `WINDOW` rounded up to a power of two.
        KP: `SELECTED` rounded up to a power of two, at least a warp.
        CAPACITY: Entries of a window, rounded up to a power of two.
        DECAY: Whether parameters decay, also those that are not selected.
        DENSE: Whether error feedback enters the update.
        PAD: PTX that declares the scratchpad.
        CAPTURABLE: Whether what depends on the step follows from the tensor's counter, which is in its row of the
            table; the corrections are then their numerators.
        LR_ON_DEVICE: Whether `lr` is a pointer.
        FULL: Whether the correction counts all steps, not only those in the window.
        BULK: As in `tl_prefetch`.
    """
    SIZE: tl.constexpr = RUNS * LANES * 8
    COLUMNS: tl.constexpr = NUM_LISTS + CAPTURABLE + 2
    chunk = tl.program_id(0) // (CHUNK // SIZE)
    row = tl.load(chunk_row + chunk).to(tl.int64)
    numel = tl.load(rows + row * COLUMNS + COLUMNS - 2)
    first = tl.load(chunk_offset + chunk) + (tl.program_id(0) % (CHUNK // SIZE)) * SIZE
    if first < numel:
        rate = tl_load_scalar(lr, LR_ON_DEVICE)
        if CAPTURABLE:
            step = tl.load(tl_pointer(rows, row, NUM_LISTS, COLUMNS, tl.float32, False)).to(tl.int32)
            slot, filled = (step - 1) % WINDOW, tl.minimum(step, WINDOW)
            age = step if FULL else filled
            correction1 = _correction(correction1, log2_beta1, age)
            correction2 = _correction(correction2, log2_beta2, age)
            decay = 1.0 - rate * weight_decay
        block = first // SIZE
        parameter = tl_pointer(rows, row, 0, COLUMNS, P_DTYPE, ALIGNED) + tl.multiple_of(first, 16)
        # Four of five sectors are read in the end, but not before the window is; all are asked for meanwhile.
        if ALIGNED and first + SIZE <= numel:
            tl_prefetch(parameter, SIZE * P_DTYPE.primitive_bitwidth // 8, BULK)
        indices = tl_pointer(rows, row, 5, COLUMNS, tl.int16, ALIGNED) + block * (WINDOW * SELECTED)
        values = tl_pointer(rows, row, 6, COLUMNS, tl.bfloat16, ALIGNED) + block * (WINDOW * SELECTED)
        error = (parameter, parameter, parameter)
        if DENSE:
            codes = tl_pointer(rows, row, 2, COLUMNS, tl.int32, False) + first // 8
            minima = tl_pointer(rows, row, 3, COLUMNS, tl.bfloat16, False) + block * BUCKETS
            error = (codes, minima, tl_pointer(rows, row, 4, COLUMNS, tl.bfloat16, False) + block * BUCKETS)
        left = tl.minimum(numel - first, SIZE).to(tl.int32)
        selected = tl.where(left == SIZE, SELECTED, tail_selected(left, NUMERATOR, DENOMINATOR))
        _update_block(
            tl_scratchpad(scratch, PAD, SIZE // 16 + 3 * CAPACITY), parameter, error, indices, values, slot, filled,
            left, selected, rate, decay, log2_beta1, log2_beta2, correction1, correction2, eps, alpha, rest,
            RUNS, LANES, BUCKETS, WINDOW, WP, KP, CAPACITY, P_DTYPE, DECAY, DENSE,
        )  # fmt: skip
