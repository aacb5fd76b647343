"""The kernels compiled for sm_90, which needs no GPU: no spills but the few of the register limit, vector loads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, subprocess, sys, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from optplan.optim_impls.micro_adam.select_kernels import select_kernel
from optplan.optim_impls.micro_adam.update_kernels import update_kernel
tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
common = dict(WINDOW=10, SELECTED=21, KP=32, NUMERATOR=1, DENOMINATOR=100, ALIGNED=True, CHUNK=65536)
select = dict(RUNS=8, BUCKETS=32, G_DTYPE=tl.bfloat16, FACTOR=0, STOCHASTIC=False, TAIL=False)
update = dict(SIZE=2048, WP=16, P_DTYPE=tl.bfloat16, SHARED="{ .shared .align 16 .b8 sums[16384]; mov.u32 $0, sums; }")
types = {"rows": "*i64", "scratch": "*i64", "chunk_offset": "*i64", "chunk_row": "*i32"}
types |= dict.fromkeys(("seed", "step", "slot", "filled"), "i32")
jobs = [("select", select_kernel, select, {}), ("select_128", select_kernel, select, {"maxnreg": 128}),
        ("update", update_kernel, update | {"DECAY": False}, {}),
        ("decay", update_kernel, update | {"DECAY": True}, {})]
for name, kernel, constants, options in jobs:
    constants = common | constants
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "fp32") for n in names}
    values = {(names.index(n),): v for n, v in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=1, **options))
    path = os.path.join(sys.argv[1], name + ".cubin")
    open(path, "wb").write(compiled.asm["cubin"])
    print("==", name)
    print(subprocess.run([tools, "--dump-resource-usage", "-sass", path], capture_output=True, text=True).stdout)
"""


@pytest.fixture(scope="module", name="kernels")
def _kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("cubins")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    script = Path(folder, "compile.py")
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    parts = re.split(r"^== (\w+)$", done.stdout, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


# Bytes of stack are spills. At 128 registers 16 warps fit a multiprocessor, at 168 12, where memory of update ends too.
@pytest.mark.parametrize(
    ("name", "registers", "stack"), [("select", 168, 0), ("select_128", 128, 96), ("update", 168, 0), ("decay", 255, 0)]
)
def test_registers_and_spills(kernels: dict[str, str], name: str, registers: int, stack: int) -> None:
    usage = re.search(r"REG:(\d+) STACK:(\d+)", kernels[name])
    assert usage is not None
    assert int(usage[1]) <= registers
    assert int(usage[2]) <= stack


# 2048 bf16 elements in one warp: eight loads of 16 bytes a thread for the gradient; as many for parameters that decay.
@pytest.mark.parametrize(("name", "num_loads"), [("select", 8), ("select_128", 8), ("decay", 8), ("update", 0)])
def test_dense_loads_are_vectors(kernels: dict[str, str], name: str, num_loads: int) -> None:
    assert len(re.findall(r"\bLDG\.E\.128\b", kernels[name])) >= num_loads


def test_the_selection_keeps_within_its_instructions(kernels: dict[str, str]) -> None:
    # 64 elements a thread; half a hundred instructions each is what memory takes for the whole step.
    num_instructions = len(re.findall(r"/\*[0-9a-f]{4}\*/\s+\S", kernels["select"]))
    assert 1500 < num_instructions < 3200
