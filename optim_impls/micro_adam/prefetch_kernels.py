"""A device helper that asks for memory before it is needed, so that the second-level cache has it by then."""

from __future__ import annotations

import triton
import triton.language as tl

from optplan.optim_impls.triton_math import INTERPRETED


@triton.jit
def tl_prefetch(pointer, NUM_BYTES: tl.constexpr, BULK: tl.constexpr):
    """Ask for so many bytes, a multiple of 16, from a pointer that lies at 16 bytes; takes no register, nobody waits.

    Nothing in the interpreter, where there is no cache.

    Args:
        pointer: The same in all threads of the warp.
        NUM_BYTES: How many.
        BULK: Whether one thread may ask for all, as compute capability 9.0 can; else each asks for lines of its own.
    """
    if not INTERPRETED:
        if BULK:
            tl.inline_asm_elementwise(
                "{ .reg .pred p; .reg .b32 lane; .reg .b64 a; mov.u32 lane, %laneid; setp.eq.u32 p, lane, 0;"
                " cvta.to.global.u64 a, $1; @p cp.async.bulk.prefetch.L2.global [a], $2; mov.b32 $0, 0; }",
                "=r,l,r", [pointer.to(tl.int64), NUM_BYTES], dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        else:
            line = tl.arange(0, triton.next_power_of_2(NUM_BYTES // 128))
            tl.inline_asm_elementwise(
                "{ .reg .b64 a; cvta.to.global.u64 a, $1; prefetch.global.L2 [a]; mov.b32 $0, 0; }",
                "=r,l", [pointer.to(tl.int64) + 128 * line], dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
