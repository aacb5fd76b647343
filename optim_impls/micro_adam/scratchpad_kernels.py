"""Device helpers for a program's scratchpad of 32-bit words: shared memory on a GPU, global memory in the interpreter.

Triton 3.6 has neither scatter nor atomics for shared memory; a line of PTX does each. The barriers are the caller's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optplan.optim_impls.triton_math import INTERPRETED

SHARED = "{{ .shared .align 16 .b8 pad[{}]; mov.u32 $0, pad; }}"
"""PTX that declares a scratchpad of so many bytes and yields its address."""


@triton.jit
def tl_scratchpad(scratch, DECLARATION: tl.constexpr, NUM_WORDS: tl.constexpr):
    """Where the program's scratchpad is: an address in shared memory, or a piece of int32 `scratch`."""
    if INTERPRETED:
        return scratch + tl.program_id(0) * NUM_WORDS
    else:
        return tl.inline_asm_elementwise(DECLARATION, "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def tl_get(pad, word, mask):
    """The words at `word`; where `mask` is off it may be any."""
    if INTERPRETED:
        return tl.load(pad + word, mask=mask, other=0)
    else:
        return tl.inline_asm_elementwise(
            "ld.shared.b32 $0, [$1];", "=r,r", [pad + 4 * word], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def tl_put(pad, word, value, mask):
    """Write int32 values."""
    if INTERPRETED:
        tl.store(pad + word, value, mask=mask)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.shared.b32 [$1], $2; mov.b32 $0, 0; }",
            "=r,r,r,r", [pad + 4 * word, value, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def tl_put_bits(pad, word, bits, mask):
    """Set bits of words; several may be of one word."""
    if INTERPRETED:
        tl.atomic_or(pad + word, bits, mask=mask)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p red.shared.or.b32 [$1], $2; mov.b32 $0, 0; }",
            "=r,r,r,r", [pad + 4 * word, bits, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def tl_get_two(pad, word, mask):
    """The words at `word`, even, and at the next."""
    if INTERPRETED:
        return tl.load(pad + word, mask=mask, other=0), tl.load(pad + word + 1, mask=mask, other=0)
    else:
        return tl.inline_asm_elementwise(
            "ld.shared.v2.b32 {$0, $1}, [$2];", "=r,=r,r", [pad + 4 * word],
            dtype=(tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def tl_put_two(pad, word, first, second, mask):
    """Write int32 values to `word`, even, and to the next."""
    if INTERPRETED:
        tl.store(pad + word, first, mask=mask)
        tl.store(pad + word + 1, second, mask=mask)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $4, 0; @p st.shared.v2.b32 [$1], {$2, $3}; mov.b32 $0, 0; }",
            "=r,r,r,r,r", [pad + 4 * word, first, second, mask.to(tl.int32)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
