"""The AdamW kernel compiled for an H100 or H200 (sm_90), which needs no GPU: registers, spills, vector accesses."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

CODE = runpy.run_path(str(Path(__file__).parents[1] / "machine_code.py"))
SCRIPT = """
from optplan.optim_impls.adamw import launcher
from optplan.optim_impls.adamw.kernels import adamw_kernel

KINDS = dict(rows="*i64", chunk_offset="*i64", chunk_row="*i32", grad_scale="*fp32", seed="i32", step="i32")

def compiled(dtype, rounding, capturable=False, scheduled=False):
    constants = dict(
        P=dtype, G=dtype, M=dtype, V=dtype, ROUNDING=launcher._ROUNDINGS[rounding], CAPTURABLE=capturable, ALIGNED=True,
        SCALE_ON_DEVICE=True, LR_ON_DEVICE=scheduled, CHUNK=launcher.CHUNK_NUMEL, SPAN=launcher.SPAN,
        BLOCK=launcher.BLOCK, TAIL=launcher.TAIL,
    )
    kinds = KINDS | ({"lr": "*fp64"} if scheduled else {})
    return figures(adamw_kernel, kinds, constants, aligned=["rows"], num_warps=launcher.NUM_WARPS)

print(json.dumps({
    **{name: compiled(tl.bfloat16, name) for name in ("nearest", "stochastic", "kahan")},
    "capturable": compiled(tl.bfloat16, "nearest", True),
    "scheduled": compiled(tl.bfloat16, "nearest", True, True),
    "fp32": compiled(tl.float32, "nearest"),
}))
"""


@pytest.fixture(scope="module", name="kernels")
def _kernels() -> Any:
    return CODE["run"](SCRIPT)


# Vector loads and stores of 16 bytes: of bf16 one for each list and thread's 8 elements, of fp32 two.
@pytest.mark.parametrize(
    ("name", "num_loads", "num_stores", "most_registers"),
    [
        ("nearest", 4, 3, 64),
        ("stochastic", 4, 3, 80),
        ("kahan", 5, 4, 80),
        ("capturable", 4, 3, 64),
        ("scheduled", 4, 3, 64),
        ("fp32", 8, 6, 72),
    ],
)
def test_vector_accesses_and_no_spills(
    kernels: Any, name: str, num_loads: int, num_stores: int, most_registers: int
) -> None:
    found = kernels[name]
    assert (found["stack"], found["local"]) == (0, 0)
    assert found["registers"] <= most_registers
    assert [CODE["count"](found, operation) for operation in ("LDG.E.128", "STG.E.128")] == [num_loads, num_stores]
