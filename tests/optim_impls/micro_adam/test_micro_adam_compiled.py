"""The kernels compiled for sm_90, which needs no GPU: few spills or none, vector loads."""

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
shared = "{ .shared .align 16 .b8 pad[3584]; mov.u32 $0, pad; }"
common = dict(
    RUNS=8, LANES=32, BUCKETS=32, WINDOW=10, SELECTED=21, NUMERATOR=1, DENOMINATOR=100, ALIGNED=True, CHUNK=65536,
    PAD=shared, CAPTURABLE=False,
)
select = dict(CAPACITY=32, G_DTYPE=tl.bfloat16, FACTOR=0, STOCHASTIC=False, TAIL=False)
update = dict(
    WP=16, KP=32, CAPACITY=256, P_DTYPE=tl.bfloat16, LR_ON_DEVICE=False, FULL=True, DECAY=False, DENSE=False
)
types = {"rows": "*i64", "scratch": "*i32", "chunk_offset": "*i64", "chunk_row": "*i32"}
types |= dict.fromkeys(("seed", "step", "slot", "filled"), "i32")
jobs = [("select", select_kernel, select, {"maxnreg": 104}),
        ("select_fp32", select_kernel, select | {"G_DTYPE": tl.float32}, {"maxnreg": 104}),
        ("update", update_kernel, update, {}),
        ("decay", update_kernel, update | {"DECAY": True}, {}),
        ("dense", update_kernel, update | {"DENSE": True}, {}),
        ("dense_on_sm80", update_kernel, update | {"DENSE": True}, {"arch": 80}),
        ("select_on_sm80", select_kernel, select, {"arch": 80}),
        ("capturable", update_kernel, update | {"CAPTURABLE": True, "LR_ON_DEVICE": True}, {})]
for name, kernel, constants, options in jobs:
    constants = common | constants
    names = kernel.arg_names
    own = types | ({"lr": "*fp64"} if constants.get("LR_ON_DEVICE") else {})
    signature = {n: "constexpr" if n in constants else own.get(n, "fp32") for n in names}
    values = {(names.index(n),): v for n, v in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    target = GPUTarget("cuda", options.pop("arch", 90), 32)
    compiled = triton.compile(source, target=target, options=dict(num_warps=1, **options))
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


# Bytes of stack are spills. At 104 registers 19 warps fit a multiprocessor, at 64 all 32 that it takes of single warps.
@pytest.mark.parametrize(
    ("name", "registers", "stack"),
    [
        ("select", 104, 40),
        ("select_fp32", 104, 96),
        ("update", 64, 0),
        ("decay", 168, 0),
        ("dense", 192, 0),
        ("capturable", 80, 0),
        ("dense_on_sm80", 255, 0),
        ("select_on_sm80", 255, 0),
    ],
)
def test_registers_and_spills(kernels: dict[str, str], name: str, registers: int, stack: int) -> None:
    usage = re.search(r"REG:(\d+) STACK:(\d+)", kernels[name])
    assert usage is not None
    assert int(usage[1]) <= registers
    assert int(usage[2]) <= stack


# 2048 elements in one warp: eight loads of 16 bytes a thread for a bf16 gradient, 16 for an fp32 one; as many as for
# the gradient for parameters that decay.
@pytest.mark.parametrize(
    ("name", "num_loads"), [("select", 8), ("select_fp32", 16), ("decay", 8), ("dense", 8), ("update", 0)]
)
def test_dense_loads_are_vectors(kernels: dict[str, str], name: str, num_loads: int) -> None:
    assert len(re.findall(r"\bLDG\.E\.128\b", kernels[name])) >= num_loads


# Two elements an instruction: a fused multiply-add for each pair to decode it and one to encode it, two additions, a
# comparison for each trip of the search, the ends of ranges.
@pytest.mark.parametrize(
    ("operation", "at_least"), [(r"HFMA2\S*BF16", 64), (r"HADD2\S*BF16", 32), ("HSET2", 64), ("V?HMNMX", 32)]
)
def test_pairs_are_computed_at_once(kernels: dict[str, str], operation: str, at_least: int) -> None:
    assert len(re.findall(rf"\b{operation}", kernels["select"])) >= at_least


# 64 elements a thread: the rare searches over all elements and their ties are two fifths of these.
@pytest.mark.parametrize(("name", "low", "high"), [("select", 1500, 2700), ("update", 600, 1100)])
def test_the_kernels_keep_within_their_instructions(kernels: dict[str, str], name: str, low: int, high: int) -> None:
    assert low < len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+\S", kernels[name])) < high
