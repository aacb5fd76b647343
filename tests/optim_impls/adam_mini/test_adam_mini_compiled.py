"""Every kernel compiled for an H100 or H200 (sm_90), which needs no GPU: spills, registers, vector accesses."""

from __future__ import annotations

import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest

CODE = runpy.run_path(str(Path(__file__).parents[1] / "machine_code.py"))
SCRIPT = """
from optplan.optim_impls.adam_mini import column_kernels, kernels, launcher, segment_kernels
from optplan.planner.optimizers import adam_mini_work as work

KINDS = dict(table="*i64", partials="*fp32", device_values="*fp32", shared_sums="*fp32") | dict.fromkeys(
    kernels.UNSPECIALIZED, "i32"
)

def compiled(kernel, num_warps, **constants):
    return figures(kernel, KINDS, constants, num_warps=num_warps)

found = {}
for name, dtype in (("bfloat16", tl.bfloat16), ("float32", tl.float32)):
    kinds = dict(P=dtype, G=dtype, M=dtype, ON_DEVICE=False)
    updating = dict(kinds, STOCHASTIC=False)
    aligned = dict(updating, ALIGNED=True)
    for numel, width in ((4096, 4096), (11008, 16384)):
        found[f"rows of {numel}, {name}"] = compiled(
            kernels.rows_kernel, launcher._MAX_WARPS, **aligned, NUMEL=numel, WIDTH=width, TILE_ROWS=1, TILES=5
        )
    chunk = dict(kinds, ALIGNED=True, CHUNK=work.ONE_PROGRAM_NUMEL, TILE=launcher._SEGMENT_TILE)
    tile = dict(kinds, ALIGNED=True, TILE=work.COLUMN_TILE, ROWS=launcher._COLUMN_ROWS)
    rounding = dict(STOCHASTIC=False)
    for title, kernel, warps, constants in (
        ("segment sums", segment_kernels.segment_sums_kernel, launcher._SEGMENT_WARPS, chunk),
        ("segment update", segment_kernels.segment_update_kernel, launcher._SEGMENT_WARPS, chunk | rounding),
        ("column sums", column_kernels.column_sums_kernel, launcher._COLUMN_WARPS, tile),
        ("column update", column_kernels.column_update_kernel, launcher._COLUMN_WARPS, tile | rounding),
        ("elements", kernels.elements_kernel, 4, dict(updating, CHUNK=work.ELEMENT_CHUNK_NUMEL)),
    ):
        found[f"{title}, {name}"] = compiled(kernel, warps, **constants)
stochastic = dict(P=tl.bfloat16, G=tl.bfloat16, M=tl.bfloat16, ON_DEVICE=False, ALIGNED=True, STOCHASTIC=True)
found["rows of 4096, stochastic"] = compiled(
    kernels.rows_kernel, launcher._MAX_WARPS, **stochastic, NUMEL=4096, WIDTH=4096, TILE_ROWS=1, TILES=5
)
found["segment update, stochastic"] = compiled(
    segment_kernels.segment_update_kernel, launcher._SEGMENT_WARPS, **stochastic, CHUNK=work.ONE_PROGRAM_NUMEL,
    TILE=launcher._SEGMENT_TILE,
)
found["segment moments"] = compiled(segment_kernels.segment_moments_kernel, 1, SHARED=False, LANES=launcher._SUM_LANES)
found["column moments"] = compiled(
    column_kernels.column_moments_kernel, 4, SHARED=False, TILE=work.COLUMN_TILE, LANES=128
)
print(json.dumps(found))
"""

CASES = [
    # 16-byte loads and stores: three lists and two of a thread's 16, 64 or 8 elements, 8 of bf16 or 4 of fp32 each.
    ("rows of 4096, bfloat16", [6, 4], 64),
    ("rows of 4096, float32", [12, 8], 64),
    ("rows of 11008, bfloat16", [18, 12], 128),
    ("rows of 11008, float32", [33, 22], 128),
    ("segment sums, bfloat16", [1, 0], 64),
    ("segment sums, float32", [2, 0], 64),
    ("segment update, bfloat16", [3, 2], 64),
    ("segment update, float32", [6, 4], 64),
    ("column sums, bfloat16", [1, 0], 64),
    ("column sums, float32", [2, 0], 64),
    ("column update, bfloat16", [3, 2], 96),
    ("column update, float32", [6, 4], 96),
    ("elements, bfloat16", [0, 0], 64),
    ("elements, float32", [0, 0], 64),
    ("rows of 4096, stochastic", [6, 4], 96),
    ("segment update, stochastic", [3, 2], 96),
    ("segment moments", [0, 0], 64),
    ("column moments", [0, 0], 64),
]


@cache
def _compiled() -> dict[str, Any]:
    found: dict[str, Any] = CODE["run"](SCRIPT)
    return found


@pytest.mark.parametrize(("kernel", "vectors", "most_registers"), CASES)
def test_vector_accesses_and_no_spills(kernel: str, vectors: list[int], most_registers: int) -> None:
    found = _compiled()[kernel]
    assert (found["stack"], found["local"]) == (0, 0)
    assert [CODE["count"](found, operation) for operation in ("LDG.E.128", "STG.E.128")] == vectors
    assert found["registers"] <= most_registers


def test_every_kernel_is_compiled() -> None:
    assert set(_compiled()) == {kernel for kernel, *_ in CASES}
