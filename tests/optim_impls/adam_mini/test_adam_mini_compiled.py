"""Every kernel compiled for an H100 or H200 (sm_90), which needs no GPU: spills, registers, vector accesses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

# In a process of its own: where kernels are interpreted, triton cannot compile them.
COMPILE = """
import collections, json, os, re, subprocess, tempfile
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from optplan.optim_impls.adam_mini import column_kernels, kernels, launcher, segment_kernels
from optplan.planner.optimizers import adam_mini_work as work

KINDS = dict(table="*i64", partials="*fp32", device_values="*fp32", shared_sums="*fp32") | dict.fromkeys(
    kernels.UNSPECIALIZED, "i32"
)

def figures(kernel, num_warps, **constants):
    names = kernel.arg_names
    kinds = dict.fromkeys(names, "fp32") | {name: kind for name, kind in KINDS.items() if name in names}
    kinds |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel, signature=kinds, constexprs={(names.index(name),): value for name, value in constants.items()}
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
        run = lambda flag: subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
        usage, code = run("--dump-resource-usage"), run("-sass")
    registers, stack, local = re.search(r"REG:(\\d+) STACK:(\\d+) SHARED:\\d+ LOCAL:(\\d+)", usage).groups()
    counts = collections.Counter(re.findall(r"\\b((?:LDG|STG)\\.E\\.128)", code))
    vectors = [counts["LDG.E.128"], counts["STG.E.128"]]
    return {"registers": int(registers), "spilled": int(stack) + int(local), "vectors": vectors}

found = {}
for name, dtype in (("bfloat16", tl.bfloat16), ("float32", tl.float32)):
    kinds = dict(P=dtype, G=dtype, M=dtype, ON_DEVICE=False)
    updating = dict(kinds, STOCHASTIC=False)
    aligned = dict(updating, ALIGNED=True)
    for numel, width in ((4096, 4096), (11008, 16384)):
        found[f"rows of {numel}, {name}"] = figures(
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
        found[f"{title}, {name}"] = figures(kernel, warps, **constants)
stochastic = dict(P=tl.bfloat16, G=tl.bfloat16, M=tl.bfloat16, ON_DEVICE=False, ALIGNED=True, STOCHASTIC=True)
found["rows of 4096, stochastic"] = figures(
    kernels.rows_kernel, launcher._MAX_WARPS, **stochastic, NUMEL=4096, WIDTH=4096, TILE_ROWS=1, TILES=5
)
found["segment update, stochastic"] = figures(
    segment_kernels.segment_update_kernel, launcher._SEGMENT_WARPS, **stochastic, CHUNK=work.ONE_PROGRAM_NUMEL,
    TILE=launcher._SEGMENT_TILE,
)
found["segment moments"] = figures(segment_kernels.segment_moments_kernel, 1, SHARED=False, LANES=launcher._SUM_LANES)
found["column moments"] = figures(
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
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    figures: dict[str, Any] = json.loads(result.stdout)
    return figures


@pytest.mark.parametrize(("kernel", "vectors", "most_registers"), CASES)
def test_vector_accesses_and_no_spills(kernel: str, vectors: list[int], most_registers: int) -> None:
    found = _compiled()[kernel]
    assert found["spilled"] == 0
    assert found["vectors"] == vectors
    assert found["registers"] <= most_registers


def test_every_kernel_is_compiled() -> None:
    assert set(_compiled()) == {kernel for kernel, *_ in CASES}
