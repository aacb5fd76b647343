"""Adapprox's kernels compiled for an H100 or H200 (sm_90), which needs no GPU: spills, registers, copies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

# In a process of its own: where kernels are interpreted, triton cannot compile them.
COMPILE = """
import collections, json, os, re, subprocess, sys, tempfile
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from optplan.optim_impls.adapprox import factor_kernels, kernels, launcher

def figures(kernel, constants, settings):
    options = {name: settings.pop(name) for name in ("num_warps", "maxnreg") if name in settings}
    constants = constants | settings
    names = kernel.arg_names
    kinds = dict.fromkeys(names, "fp32") | dict.fromkeys(constants, "constexpr")
    kinds |= dict(table="*i64", owners="*i32", scratch="*fp32")
    source = ASTSource(
        fn=kernel, signature={name: kinds[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in ("table", "owners", "scratch")},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
        run = lambda flag: subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
        usage, code = run("--dump-resource-usage"), run("-sass")
    registers = re.search(r"REG:(\\d+)", usage).group(1)
    counts = collections.Counter(re.findall(r"\\b((?:LDGSTS|LDG|STG|LDL|STL|HGMMA)[A-Z0-9.]*)", code))
    return {"registers": int(registers), "shared": compiled.metadata.shared, "accesses": counts}

def compiled(which, dtype, momentum, again=0, rank=32):
    dtype = getattr(torch, dtype)
    tile = dict(GRAD=launcher.DTYPES[dtype], SCALED=0, RANK=rank, R=rank, BM=64, BN=64, EVEN=True, AGAIN=again)
    if which == "sketch":
        return figures(kernels.sketch_kernel, tile, launcher.pass_a_settings(dtype, rank))
    if which == "update":
        kinds = dict(WEIGHT=launcher.DTYPES[dtype], MOMENT=launcher.DTYPES[dtype] if momentum else None, LR=1)
        settings = launcher.pass_b_settings(dtype, dtype, rank, momentum=momentum)
        return figures(kernels.update_kernel, tile | kinds, settings)
    if which == "again":
        return figures(factor_kernels.again_kernel, dict(RANK=rank, R=rank, AGAIN=again), dict(num_warps=4))
    small = dict(num_warps=launcher.small_warps(rank))
    return figures(factor_kernels.second_gram_kernel, dict(R=rank, AGAIN=again), small)

print(json.dumps([compiled(*case) for case in json.loads(sys.argv[1])]))
"""

SHARED_BYTES = 227 * 1024
"""Shared memory of a multiprocessor."""
PASSES = [
    # The programs that a multiprocessor has room for; held to 128 registers, some that the loop seldom needs spill.
    ("sketch", "bfloat16", True, 4, 0),
    ("update", "bfloat16", True, 2, 0),
    ("update", "bfloat16", False, 4, 40),
    ("update", "float32", True, 2, 0),
]
BETWEEN = ("second gram", "float32", False)
SECOND_ITERATION = [
    (which, dtype, False, told)
    for which, dtype in (("sketch", "bfloat16"), ("sketch", "float32"), ("update", "bfloat16"), ("again", "float32"))
    for told in (1, 2)
]
"""Where the host tells that there is one, and where the device does."""


@pytest.fixture(scope="module")
def figures() -> dict[tuple[Any, ...], dict[str, Any]]:
    """What the compiler says of each kernel."""
    cases = [*(case[:3] for case in PASSES), BETWEEN, *SECOND_ITERATION]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return dict(zip(cases, json.loads(done.stdout), strict=True))


def _spills(accesses: dict[str, int]) -> int:
    return sum(n for name, n in accesses.items() if name.startswith(("LDL", "STL")))


@pytest.mark.parametrize(("which", "dtype", "momentum", "programs", "few_spills"), PASSES)
def test_the_passes_load_ahead_in_vectors(
    figures: Any, which: str, dtype: str, momentum: bool, programs: int, few_spills: int
) -> None:
    found = figures[which, dtype, momentum]
    accesses = found["accesses"]
    assert found["registers"] * 128 * programs <= 65536
    assert found["shared"] * programs <= SHARED_BYTES
    assert _spills(accesses) <= few_spills
    assert {name for name in accesses if name.startswith("LDGSTS")} == {"LDGSTS.E.BYPASS.128"}
    assert sum(n for name, n in accesses.items() if name.startswith("HGMMA")) >= 6


def test_what_lies_between_does_not_spill(figures: Any) -> None:
    assert _spills(figures[BETWEEN]["accesses"]) <= 4


@pytest.mark.parametrize("case", SECOND_ITERATION)
def test_the_second_iteration_writes_only_its_band_and_does_not_spill(figures: Any, case: tuple[Any, ...]) -> None:
    """128 threads store 64 x 32 numbers of 4 bytes, 16 bytes at a time; pass A also its sum of squares."""
    accesses = figures[case]["accesses"]
    stores = {name: n for name, n in accesses.items() if name.startswith("STG")}
    assert stores == {"STG.E.128": 4} | ({"STG.E": 1} if case[0] == "sketch" else {})
    assert _spills(accesses) == 0
