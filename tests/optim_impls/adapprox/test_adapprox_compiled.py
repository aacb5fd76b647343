"""Adapprox's kernels compiled for an H100 or H200 (sm_90), which needs no GPU: spills, registers, copies."""

from __future__ import annotations

import json
import os
import subprocess
import sys

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

which, dtype, momentum, rank = json.loads(sys.argv[1])
dtype = getattr(torch, dtype)
tile = dict(GRAD=launcher.DTYPES[dtype], SCALED=0, RANK=rank, R=rank, BM=64, BN=64, EVEN=True)
if which == "sketch":
    found = figures(kernels.sketch_kernel, tile, launcher.pass_a_settings(dtype, rank))
elif which == "update":
    kinds = dict(WEIGHT=launcher.DTYPES[dtype], MOMENT=launcher.DTYPES[dtype] if momentum else None, LR=1)
    settings = launcher.pass_b_settings(dtype, dtype, rank, momentum=momentum)
    found = figures(kernels.update_kernel, tile | kinds, settings)
else:
    constants = dict(R=rank) if "gram" in which else dict(RANK=rank, R=rank)
    found = figures(getattr(factor_kernels, which), constants, dict(num_warps=launcher.small_warps(rank)))
print(json.dumps(found))
"""

SHARED_BYTES = 227 * 1024
"""Shared memory of a multiprocessor."""


def _compiled(*case: object) -> dict[str, object]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize(
    ("which", "dtype", "momentum", "programs", "few_spills"),
    [
        ("sketch", "bfloat16", True, 4, 0),
        ("update", "bfloat16", True, 2, 0),
        # Held to 128 registers for a fourth program; some that the loop seldom needs spill.
        ("update", "bfloat16", False, 4, 40),
        ("update", "float32", True, 2, 0),
    ],
)
def test_the_passes_load_ahead_in_vectors(
    which: str, dtype: str, momentum: bool, programs: int, few_spills: int
) -> None:
    found = _compiled(which, dtype, momentum, 32)
    accesses: dict[str, int] = found["accesses"]  # type: ignore[assignment]
    assert int(found["registers"]) * 128 * programs <= 65536  # type: ignore[call-overload]
    assert int(found["shared"]) * programs <= SHARED_BYTES  # type: ignore[call-overload]
    assert sum(n for name, n in accesses.items() if name.startswith(("LDL", "STL"))) <= few_spills
    copies = {name for name in accesses if name.startswith("LDGSTS")}
    assert copies == {"LDGSTS.E.BYPASS.128"}
    assert sum(n for name, n in accesses.items() if name.startswith("HGMMA")) >= 6


def test_what_lies_between_does_not_spill() -> None:
    accesses: dict[str, int] = _compiled("second_gram_kernel", "float32", False, 32)["accesses"]  # type: ignore[assignment]
    assert sum(n for name, n in accesses.items() if name.startswith(("LDL", "STL"))) <= 4
