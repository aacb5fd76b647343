"""Device helpers of our kernels: casts that round alike on a GPU and in Triton's interpreter, and a counter hash.

The interpreter of Triton 3.6 truncates fp32 to bf16 and misreads subnormal bf16; a GPU rounds to nearest even. Under
`TRITON_INTERPRET=1` the helpers therefore do both on the bits.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def tl_bf16(x):
    """fp32 to bf16, to nearest even; NaN stays NaN."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x != x, 0x7FC0, rounded)
        return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def tl_fp32(x):
    """fp32, bf16 or fp16 to fp32, exactly."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def tl_dot_bf16(a, b, acc):
    """Acc + a @ b of bf16 operands, summed in fp32. The interpreter would multiply their bit patterns."""
    if INTERPRETED:
        return tl.dot(tl_fp32(a), tl_fp32(b), acc=acc)
    else:
        return tl.dot(a, b, acc=acc)


@triton.jit
def tl_cast(x, dtype: tl.constexpr):
    """fp32 to `dtype` (fp32, bf16, fp16), to nearest even."""
    if dtype == tl.bfloat16:
        return tl_bf16(x)
    else:
        return x.to(dtype)


@triton.jit
def tl_root(x):
    """The square root to about two units; subnormal numbers count as zero."""
    if INTERPRETED:
        return tl.sqrt(x)
    else:
        return tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def tl_reciprocal(x):
    """1 / x to about one unit, in one instruction; of zero infinity."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def tl_hash(index, seed):
    """32 random bits for each int64 `index` under a 32-bit `seed`, as uint32; the bits of `rounding.counter_hash`."""
    return _mix(index.to(tl.uint32), (index >> 32).to(tl.uint32), seed)


@triton.jit
def tl_hash_block(start, lane, seed):
    """As `tl_hash` for `start + lane`, in 32-bit arithmetic.

    Args:
        start: int64 scalar, a multiple of a power of two that no lane reaches, so that the low word does not overflow.
        lane: int32.
        seed: 32-bit scalar.
    """
    return _mix(start.to(tl.uint32) + lane.to(tl.uint32), (start >> 32).to(tl.uint32), seed)


@triton.jit
def tl_hash_from(start, lane, seed):
    """As `tl_hash` for `start + lane`, in 32-bit arithmetic.

    Args:
        start: int64 scalar, any.
        lane: Integers from 0 to 2^31, of which the low words count.
        seed: 32-bit scalar.
    """
    begin = start.to(tl.uint32)
    low = begin + lane.to(tl.uint32)
    return _mix(low, (start >> 32).to(tl.uint32) + (low < begin).to(tl.uint32), seed)


@triton.jit
def _mix(low, high, seed):
    # A multiply-xorshift mix (constants of the finaliser lowbias32 of C. Wellons), keyed by seed and high word.
    x = low ^ (seed.to(tl.uint32) + high * 0x9E3779B9)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def tl_bf16_stochastic(x, random16):
    """fp32 to bf16, up or down with the probability that makes the mean exact; values of bf16 and non-finite ones stay.

    Args:
        x: fp32.
        random16: Integers of 16 random bits, of x's shape.
    """
    bits = x.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    moved = (bits + random16.to(tl.uint32)) & 0xFFFF0000
    chosen = tl.where(finite, moved, bits & 0xFFFF0000)
    # A NaN whose payload lies in the low half must not become an infinity.
    chosen = tl.where(x != x, 0x7FC00000, chosen)
    return (chosen >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def tl_pointer(rows, row, column: tl.constexpr, columns: tl.constexpr, dtype: tl.constexpr, aligned: tl.constexpr):
    """The pointer in one column of a launch table's row.

    Args:
        rows: int64 [tensors, columns]; see `launch.LaunchTable`.
        row: Row of the tensor.
        column: Which list.
        columns: Columns of a row.
        dtype: Element type behind the pointer.
        aligned: Whether it is known to begin at 16 bytes, which vector loads need.
    """
    pointer = tl.load(rows + row * columns + column).to(tl.pointer_type(dtype))
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def tl_load_scalar(value, is_pointer: tl.constexpr):
    """The number itself, or what it points to, in fp32."""
    if is_pointer:
        return tl.load(value).to(tl.float32)
    else:
        return value


@triton.jit
def tl_mix_seed(seed, step, ordinal):
    """One seed for a tensor's step, the same as `rounding.mix_seed`; all int32 scalars, the result uint32."""
    x = seed.to(tl.uint32)
    x = (x ^ (step.to(tl.uint32) * 0x9E3779B9)).to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16)
    x = (x ^ (ordinal.to(tl.uint32) * 0x9E3779B9)).to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)
