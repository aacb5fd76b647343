"""The AdamW kernel compiled for an H100 or H200 (sm_90), which needs no GPU: registers, spills, vector accesses."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# In a process of its own: where kernels are interpreted, triton cannot compile them.
COMPILE = """
import collections, json, os, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from optplan.optim_impls.adamw import launcher
from optplan.optim_impls.adamw.kernels import adamw_kernel

def figures(dtype, rounding, capturable):
    constants = dict(
        P=dtype, G=dtype, M=dtype, V=dtype, ROUNDING=rounding, CAPTURABLE=capturable, ALIGNED=True,
        SCALE_ON_DEVICE=True, LR_ON_DEVICE=False, CHUNK=launcher.CHUNK_NUMEL, SPAN=launcher.SPAN, BLOCK=launcher.BLOCK,
        TAIL=launcher.TAIL,
    )
    names = adamw_kernel.arg_names
    kinds = dict.fromkeys(names, "fp32") | dict.fromkeys(constants, "constexpr")
    kinds |= dict(rows="*i64", chunk_offset="*i64", chunk_row="*i32", grad_scale="*fp32", seed="i32", step="i32")
    source = ASTSource(
        fn=adamw_kernel, signature=kinds, constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index("rows"),): [["tt.divisibility", 16]]},
    )
    options = {"num_warps": launcher.NUM_WARPS}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
        run = lambda flag: subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
        usage, code = run("--dump-resource-usage"), run("-sass")
    registers, stack, local = re.search(r"REG:(\\d+) STACK:(\\d+) SHARED:\\d+ LOCAL:(\\d+)", usage).groups()
    counts = collections.Counter(re.findall(r"\\b((?:LDG|STG|LDL|STL)[A-Z0-9.]*)", code))
    return {"registers": int(registers), "stack": int(stack), "local": int(local), "accesses": counts}

dtype, rounding, capturable = json.loads(sys.argv[1])
kinds = {"bfloat16": triton.language.bfloat16, "float32": triton.language.float32}
print(json.dumps(figures(kinds[dtype], launcher._ROUNDINGS[rounding], capturable)))
"""

CASES = [
    # Vector loads and stores of 16 bytes: of bf16 one for each list and thread's 8 elements, of fp32 two.
    ("bfloat16", "nearest", False, 4, 3, 64),
    ("bfloat16", "stochastic", False, 4, 3, 80),
    ("bfloat16", "kahan", False, 5, 4, 80),
    ("bfloat16", "nearest", True, 4, 3, 64),
    ("float32", "nearest", False, 8, 6, 72),
]


@pytest.mark.parametrize(("dtype", "rounding", "capturable", "num_loads", "num_stores", "most_registers"), CASES)
def test_vector_accesses_and_no_spills(
    dtype: str, rounding: str, capturable: bool, num_loads: int, num_stores: int, most_registers: int
) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    arguments = json.dumps([dtype, rounding, capturable])
    command = [sys.executable, "-c", COMPILE, arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["stack"], found["local"]) == (0, 0)
    assert found["registers"] <= most_registers
    vectors = [found["accesses"].get(name) for name in ("LDG.E.128", "STG.E.128")]
    assert vectors == [num_loads, num_stores]
