"""The second kernel of a step: rebuild the moments of the selected coordinates from the window, update them.

One warp takes one block. It adds the window's rows, oldest first, into two sums for each coordinate. A row names a
coordinate once, so that plain reads and writes with a barrier between rows need no atomics and give the same sums in
every run. On a GPU the sums lie in shared memory, which Triton 3.6 has no scatter for; four lines of PTX do it. The
interpreter runs the same algorithm over global memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optplan.optim_impls.micro_adam.select_kernels import COLUMNS, tail_selected
from optplan.optim_impls.triton_math import INTERPRETED, tl_cast, tl_fp32, tl_pointer


@triton.jit
def _sums(scratch, SHARED: tl.constexpr, SIZE: tl.constexpr):
    """Where the two sums of each coordinate are: an address in shared memory, or a piece of `scratch`."""
    if INTERPRETED:
        return scratch + tl.program_id(0) * (2 * SIZE)
    else:
        return tl.inline_asm_elementwise(SHARED, "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _read(sums, index, mask):
    if INTERPRETED:
        return tl.load(sums + 2 * index, mask=mask, other=0.0), tl.load(sums + 2 * index + 1, mask=mask, other=0.0)
    else:
        return tl.inline_asm_elementwise(
            "ld.shared.v2.f32 {$0, $1}, [$2];", "=f,=f,r", [sums + 8 * index],
            dtype=(tl.float32, tl.float32), is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _write(sums, index, first, second, mask):
    if INTERPRETED:
        tl.store(sums + 2 * index, first, mask=mask)
        tl.store(sums + 2 * index + 1, second, mask=mask)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $4, 0; @p st.shared.v2.f32 [$1], {$2, $3}; mov.b32 $0, 0; }",
            "=r,r,f,f,r", [sums + 8 * index, first, second, mask.to(tl.int32)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _row(matrix, rows, t):
    """Row `t` of a matrix whose first axis lies within threads: no instruction at all."""
    return tl.sum(tl.where(rows == t, matrix, 0), axis=0)


@triton.jit
def _shrink(parameter, num_valid, decay, SIZE: tl.constexpr, P_DTYPE: tl.constexpr):
    """Weight decay of all parameters of a block; a mask would make every access scalar, so full blocks have none."""
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
def _update_block(
    parameter, indices, values, scratch, slot, filled, num_valid, num_selected,
    lr, decay, log2_beta1, log2_beta2, correction1, correction2, eps,
    SIZE: tl.constexpr, WINDOW: tl.constexpr, WP: tl.constexpr, KP: tl.constexpr, P_DTYPE: tl.constexpr,
    DECAY: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """One block; all pointers are its own."""
    time = tl.arange(0, WP)[:, None]  # the oldest row is 0, the newest WINDOW - 1
    entry = tl.arange(0, KP)[None, :]
    age = WINDOW - 1 - time
    row = (slot + 1 + time) % WINDOW
    place = row * num_selected + entry
    live = (age >= 0) & (age < filled) & (entry < num_selected)
    index = tl.load(indices + place, mask=live, other=-1).to(tl.int32)
    value = tl_fp32(tl.load(values + place, mask=live, other=0.0))
    took_part = tl.max(_row(index, time, WINDOW - 1), axis=0) >= 0
    if took_part:
        live = live & (index >= 0)
        index = tl.where(live, index, 0)
        old = tl_fp32(tl.load(parameter + index, mask=live, other=0.0))
        weight = age.to(tl.float32)
        first, second = tl.exp2(weight * log2_beta1) * value, tl.exp2(weight * log2_beta2) * (value * value)
        sums = _sums(scratch, SHARED, SIZE)
        _write(sums, index, first * 0.0, first * 0.0, live)
        tl.debug_barrier()
        for t in tl.static_range(WINDOW):
            at, alive = _row(index, time, t), _row(live.to(tl.int32), time, t) != 0
            sum1, sum2 = _read(sums, at, alive)
            _write(sums, at, sum1 + _row(first, time, t), sum2 + _row(second, time, t), alive)
            tl.debug_barrier()
        sum1, sum2 = _read(sums, index, live)
        update = (correction1 * sum1) / (tl.sqrt(correction2 * sum2) + eps)
        if DECAY:
            _shrink(parameter, num_valid, decay, SIZE, P_DTYPE)
        # Every parameter is read before any is written: rows that share a coordinate then store the same number.
        tl.debug_barrier()
        tl.store(parameter + index, tl_cast(decay * old - lr * update, P_DTYPE), mask=live)


@triton.jit(
    do_not_specialize=[
        "slot", "filled", "lr", "decay", "log2_beta1", "log2_beta2", "correction1", "correction2", "eps"
    ]
)  # fmt: skip
def update_kernel(
    rows, chunk_offset, chunk_row, scratch, slot, filled,
    lr, decay, log2_beta1, log2_beta2, correction1, correction2, eps,
    SIZE: tl.constexpr, WINDOW: tl.constexpr, WP: tl.constexpr, SELECTED: tl.constexpr, KP: tl.constexpr,
    NUMERATOR: tl.constexpr, DENOMINATOR: tl.constexpr, P_DTYPE: tl.constexpr, DECAY: tl.constexpr,
    SHARED: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Update every block of a batch.

    Args:
        rows: The launch table, as in `select_kernel`.
        chunk_offset: First element of each chunk.
        chunk_row: Tensor of each chunk.
        scratch: fp32 `[programs, SIZE, 2]` for the interpreter.
        slot: Newest row of the window.
        filled: Rows written so far.
        decay: What weight decay leaves of a parameter.
        WP: `WINDOW` rounded up to a power of two.
        DECAY: Whether all parameters change, not only the selected.
        SHARED: PTX that declares the shared memory and yields its address.
    """
    chunk = tl.program_id(0) // (CHUNK // SIZE)
    row = tl.load(chunk_row + chunk).to(tl.int64)
    numel = tl.load(rows + row * COLUMNS + 7)
    first = tl.load(chunk_offset + chunk) + (tl.program_id(0) % (CHUNK // SIZE)) * SIZE
    if first < numel:
        block = first // SIZE
        parameter = tl_pointer(rows, row, 0, COLUMNS, P_DTYPE, ALIGNED) + tl.multiple_of(first, 16)
        indices = tl_pointer(rows, row, 5, COLUMNS, tl.int16, ALIGNED) + block * (WINDOW * SELECTED)
        values = tl_pointer(rows, row, 6, COLUMNS, tl.bfloat16, ALIGNED) + block * (WINDOW * SELECTED)
        left = tl.minimum(numel - first, SIZE).to(tl.int32)
        selected = tl.where(left == SIZE, SELECTED, tail_selected(left, NUMERATOR, DENOMINATOR))
        _update_block(
            parameter, indices, values, scratch, slot, filled, left, selected,
            lr, decay, log2_beta1, log2_beta2, correction1, correction2, eps,
            SIZE, WINDOW, WP, KP, P_DTYPE, DECAY, SHARED,
        )  # fmt: skip
