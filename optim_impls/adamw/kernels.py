"""AdamW for many tensors in one launch; the same arithmetic as `reference.adamw_step`."""

from __future__ import annotations

import triton
import triton.language as tl

from optplan.optim_impls.triton_math import (
    tl_bf16_stochastic,
    tl_cast,
    tl_fp32,
    tl_hash_block,
    tl_load_scalar,
    tl_mix_seed,
    tl_pointer,
)

NEAREST: tl.constexpr = tl.constexpr(0)
STOCHASTIC: tl.constexpr = tl.constexpr(1)
KAHAN: tl.constexpr = tl.constexpr(2)


@triton.jit
def _load(pointer, mask, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointer, mask=mask, other=0.0)
    else:
        return tl.load(pointer)


@triton.jit
def _store(pointer, value, mask, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer, value, mask=mask)
    else:
        tl.store(pointer, value)


@triton.jit
def _update_block(
    p_ptr, g_ptr, m_ptr, v_ptr, c_ptr, start, numel,
    scale, step_size, decay, weight1, beta2, weight2, root_scale, eps, seed,
    ROUNDING: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    mask = start + lane < numel
    p = tl_fp32(_load(p_ptr + start + lane, mask, MASKED))
    g = tl_fp32(_load(g_ptr + start + lane, mask, MASKED)) * scale
    m = tl_fp32(_load(m_ptr + start + lane, mask, MASKED))
    v = tl_fp32(_load(v_ptr + start + lane, mask, MASKED))
    m = m + weight1 * (g - m)
    v = beta2 * v + weight2 * (g * g)
    update = step_size * m / (tl.sqrt(v) * root_scale + eps)
    _store(m_ptr + start + lane, tl_cast(m, m_ptr.dtype.element_ty), mask, MASKED)
    if ROUNDING == STOCHASTIC:
        bits = tl_hash_block(start, lane, seed)
        new = decay * p - update
        if v_ptr.dtype.element_ty == tl.bfloat16:
            _store(v_ptr + start + lane, tl_bf16_stochastic(v, bits >> 16), mask, MASKED)
        else:
            _store(v_ptr + start + lane, tl_cast(v, v_ptr.dtype.element_ty), mask, MASKED)
        if p_ptr.dtype.element_ty == tl.bfloat16:
            _store(p_ptr + start + lane, tl_bf16_stochastic(new, bits & 0xFFFF), mask, MASKED)
        else:
            _store(p_ptr + start + lane, tl_cast(new, p_ptr.dtype.element_ty), mask, MASKED)
    else:
        _store(v_ptr + start + lane, tl_cast(v, v_ptr.dtype.element_ty), mask, MASKED)
        if ROUNDING == KAHAN:
            # `decay` is minus lr x weight decay here: the change is summed before it meets the parameter.
            wanted = decay * p - update + tl_fp32(_load(c_ptr + start + lane, mask, MASKED))
            new = tl_cast(p + wanted, p_ptr.dtype.element_ty)
            lost = wanted - (tl_fp32(new) - p)
            _store(c_ptr + start + lane, tl_cast(lost, c_ptr.dtype.element_ty), mask, MASKED)
            _store(p_ptr + start + lane, new, mask, MASKED)
        else:
            _store(p_ptr + start + lane, tl_cast(decay * p - update, p_ptr.dtype.element_ty), mask, MASKED)


@triton.jit(do_not_specialize=["seed", "step"])
def adamw_kernel(
    rows, chunk_offset, chunk_row,
    grad_scale, lr, weight_decay, step_size, decay, weight1, beta2, weight2, root_scale, eps, log_beta1, log_beta2,
    seed, step,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    ROUNDING: tl.constexpr, CAPTURABLE: tl.constexpr, ALIGNED: tl.constexpr,
    SCALE_ON_DEVICE: tl.constexpr, LR_ON_DEVICE: tl.constexpr,
    CHUNK: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Update the elements of a span; CHUNK / SPAN programs share a chunk of the table.

    Columns of a row: parameter, gradient, first and second moment, compensation if KAHAN, step counter if CAPTURABLE,
    elements, ordinal. With CAPTURABLE, what follows from `lr` and the step is computed here.
    """
    COLUMNS: tl.constexpr = 6 + (ROUNDING == KAHAN) + CAPTURABLE
    PARTS: tl.constexpr = CHUNK // SPAN
    pid = tl.program_id(0)
    chunk = pid // PARTS
    row = tl.load(chunk_row + chunk).to(tl.int64)
    start = tl.load(chunk_offset + chunk) + (pid % PARTS) * SPAN
    numel = tl.load(rows + row * COLUMNS + COLUMNS - 2)
    if start < numel:
        p_ptr = tl_pointer(rows, row, 0, COLUMNS, P, ALIGNED)
        g_ptr = tl_pointer(rows, row, 1, COLUMNS, G, ALIGNED)
        m_ptr = tl_pointer(rows, row, 2, COLUMNS, M, ALIGNED)
        v_ptr = tl_pointer(rows, row, 3, COLUMNS, V, ALIGNED)
        c_ptr = p_ptr
        if ROUNDING == KAHAN:
            c_ptr = tl_pointer(rows, row, 4, COLUMNS, P, ALIGNED)
        if CAPTURABLE:
            steps = tl.load(tl_pointer(rows, row, COLUMNS - 3, COLUMNS, tl.float32, False))
            step = steps.to(tl.int32)
            # In fp64: 1 - beta2^step loses its digits in fp32 while beta2^step is near 1.
            rate = tl_load_scalar(lr, LR_ON_DEVICE)
            step_size = rate / (1.0 - tl.exp(steps.to(tl.float64) * log_beta1)).to(tl.float32)
            root_scale = (1.0 / tl.sqrt(1.0 - tl.exp(steps.to(tl.float64) * log_beta2))).to(tl.float32)
            decay = -rate * weight_decay if ROUNDING == KAHAN else 1.0 - rate * weight_decay
        key = seed
        if ROUNDING == STOCHASTIC:
            key = tl_mix_seed(seed, step, tl.load(rows + row * COLUMNS + COLUMNS - 1).to(tl.int32))
        scale = tl_load_scalar(grad_scale, SCALE_ON_DEVICE)
        start = tl.multiple_of(start, 16)
        size = tl.minimum(numel - start, SPAN).to(tl.int32)
        whole = size // BLOCK * BLOCK
        for part in range(0, whole, BLOCK):
            _update_block(
                p_ptr, g_ptr, m_ptr, v_ptr, c_ptr, tl.multiple_of(start + part, 16), numel,
                scale, step_size, decay, weight1, beta2, weight2, root_scale, eps, key, ROUNDING, False, BLOCK,
            )  # fmt: skip
        # A mask makes every access scalar, so only the rest has one.
        for part in range(whole, size, TAIL):
            _update_block(
                p_ptr, g_ptr, m_ptr, v_ptr, c_ptr, start + part, numel,
                scale, step_size, decay, weight1, beta2, weight2, root_scale, eps, key, ROUNDING, True, TAIL,
            )  # fmt: skip
