"""Device helpers for pairs: two bf16 numbers in an int32, the lower half the earlier one.

A GPU computes on both halves in one instruction; Triton has no name for these, so a line of PTX stands for each. In the
interpreter the same is done on floats. A single operation on bf16 numbers rounds alike either way: fp32 has more than
twice their digits.

Compute capability 8.0 has no addition, no comparison and no integers of this kind: a product with one and a sum stands
for the first, instructions for fp16 for the others, as magnitudes below 2^120 are numbers of it in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optplan.optim_impls.triton_math import INTERPRETED

MAGNITUDES: tl.constexpr = tl.constexpr(0x7FFF7FFF)
ONES: tl.constexpr = tl.constexpr(0x3F803F80)


@triton.jit
def tl_lower(x):
    """The lower half of each pair as fp32."""
    return (x << 16).to(tl.float32, bitcast=True)


@triton.jit
def tl_upper(x):
    """The upper half of each pair as fp32."""
    return (x & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _rounded_bits(x):
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(x != x, 0x7FC00000, rounded)


@triton.jit
def tl_pair(lower, upper):
    """Pairs of fp32 numbers, rounded to nearest even."""
    if INTERPRETED:
        return ((_rounded_bits(lower) >> 16) & 0xFFFF) | _rounded_bits(upper)
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [lower, upper], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def tl_twice(x):
    """Pairs of an fp32 number with itself, rounded to nearest even."""
    return tl_pair(x, x)


@triton.jit
def tl_add_pairs(a, b):
    """Sums, rounded to nearest even."""
    if INTERPRETED:
        return tl_pair(tl_lower(a) + tl_lower(b), tl_upper(a) + tl_upper(b))
    else:
        return tl_fma_pairs(a, tl.full(a.shape, ONES, tl.int32), b)


@triton.jit
def tl_subtract_pairs(a, b):
    """Differences, rounded to nearest even."""
    return tl_add_pairs(a, b ^ -2147450880)  # 0x80008000: both signs


@triton.jit
def tl_fma_pairs(a, b, c):
    """The sums `a b + c`, rounded once; in the interpreter only where fp32 holds the sum, as it does for codes."""
    if INTERPRETED:
        return tl_pair(tl_lower(a) * tl_lower(b) + tl_lower(c), tl_upper(a) * tl_upper(b) + tl_upper(c))
    else:
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def tl_at_least(a, b):
    """All bits of a half where a >= b, else none; both are magnitudes below 2^120, or negative."""
    if INTERPRETED:
        lower, upper = tl_lower(a) >= tl_lower(b), tl_upper(a) >= tl_upper(b)
        return tl.where(lower, 0xFFFF, 0) | tl.where(upper, -65536, 0)
    else:
        return tl.inline_asm_elementwise(
            "set.ge.u32.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _larger_bits(a, b):
    return tl.inline_asm_elementwise(
        "max.NaN.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )  # fmt: skip


@triton.jit
def tl_max_of_bits(x, axis: tl.constexpr):
    """The largest of each half, of magnitudes; 2^121 or more where one is as large or not finite."""
    if INTERPRETED:
        return tl.max(x & 0xFFFF, axis=axis) | (tl.max(x >> 16, axis=axis) << 16)
    else:
        return tl.reduce(x, axis, _larger_bits)


@triton.jit
def _smaller(a, b):
    return tl.inline_asm_elementwise(
        "min.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )  # fmt: skip


@triton.jit
def _larger(a, b):
    return tl.inline_asm_elementwise(
        "max.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )  # fmt: skip


@triton.jit
def tl_min_of_pairs(x, axis: tl.constexpr):
    """The smallest of each half."""
    if INTERPRETED:
        return tl_pair(tl.min(tl_lower(x), axis=axis), tl.min(tl_upper(x), axis=axis))
    else:
        return tl.reduce(x, axis, _smaller)


@triton.jit
def tl_max_of_pairs(x, axis: tl.constexpr):
    """The largest of each half."""
    if INTERPRETED:
        return tl_pair(tl.max(tl_lower(x), axis=axis), tl.max(tl_upper(x), axis=axis))
    else:
        return tl.reduce(x, axis, _larger)


@triton.jit
def tl_popcount(x):
    """The number of ones of each int32."""
    if INTERPRETED:
        x = x - ((x >> 1) & 0x55555555)
        x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
        return ((((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24) & 0xFF
    else:
        return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def tl_spread_codes(word):
    """The eight codes of each word, `[..., 1]`, as four pairs `[..., 4]` of 128 + code.

    Code `i` of a lower half lies in bits 4i of the word, that of an upper half in bits 4i + 16.
    """
    return ((word >> (4 * tl.arange(0, 4)[None, None, :])) & 0x000F000F) | 0x43004300
