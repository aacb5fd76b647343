"""The kernels compiled for sm_90, which needs no GPU: few spills or none, vector loads."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

CODE = runpy.run_path(str(Path(__file__).parents[1] / "machine_code.py"))
SCRIPT = """
from optplan.optim_impls.micro_adam.select_kernels import select_kernel
from optplan.optim_impls.micro_adam.update_kernels import update_kernel

shared = "{ .shared .align 16 .b8 pad[3584]; mov.u32 $0, pad; }"
common = dict(
    RUNS=8, LANES=32, BUCKETS=32, WINDOW=10, SELECTED=21, NUMERATOR=1, DENOMINATOR=100, ALIGNED=True, CHUNK=65536,
    PAD=shared, CAPTURABLE=False,
)
select = dict(CAPACITY=32, G_DTYPE=tl.bfloat16, FACTOR=0, STOCHASTIC=False, TAIL=False)
update = dict(
    WP=16, KP=32, CAPACITY=256, P_DTYPE=tl.bfloat16, LR_ON_DEVICE=False, FULL=True, DECAY=False, DENSE=False,
    BULK=True,
)
types = {"rows": "*i64", "scratch": "*i32", "chunk_offset": "*i64", "chunk_row": "*i32"}
types |= dict.fromkeys(("seed", "step", "slot", "filled"), "i32")
jobs = [("select", select_kernel, select, {"maxnreg": 128}),
        ("select_tail", select_kernel, select | {"TAIL": True}, {}),
        ("select_fp32", select_kernel, select | {"G_DTYPE": tl.float32}, {"maxnreg": 128}),
        ("update", update_kernel, update, {}),
        ("update_unaligned", update_kernel, update | {"ALIGNED": False}, {}),
        ("decay", update_kernel, update | {"DECAY": True}, {}),
        ("dense", update_kernel, update | {"DENSE": True}, {}),
        ("dense_on_sm80", update_kernel, update | {"DENSE": True, "BULK": False}, {"arch": 80}),
        ("select_on_sm80", select_kernel, select, {"arch": 80}),
        ("capturable", update_kernel, update | {"CAPTURABLE": True, "LR_ON_DEVICE": True}, {})]
found = {}
for name, kernel, constants, options in jobs:
    kinds = types | ({"lr": "*fp64"} if constants.get("LR_ON_DEVICE") else {})
    found[name] = figures(kernel, kinds, common | constants, num_warps=1, **options)
print(json.dumps(found))
"""


@pytest.fixture(scope="module", name="kernels")
def _kernels() -> Any:
    return CODE["run"](SCRIPT)


# Bytes of stack are spills. At 128 registers 16 warps fit a multiprocessor, at 64 all 32 that it takes of single warps.
@pytest.mark.parametrize(
    ("name", "registers", "stack"),
    [
        ("select", 128, 0),
        ("select_fp32", 128, 40),
        ("update", 64, 0),
        ("decay", 168, 0),
        ("dense", 192, 0),
        ("capturable", 80, 0),
        ("dense_on_sm80", 255, 0),
        ("select_on_sm80", 255, 0),
    ],
)
def test_registers_and_spills(kernels: Any, name: str, registers: int, stack: int) -> None:
    assert kernels[name]["registers"] <= registers
    assert kernels[name]["stack"] <= stack


# 2048 elements in one warp: eight loads of 16 bytes a thread for a bf16 gradient, 16 for an fp32 one; as many as for
# the gradient for parameters that decay.
@pytest.mark.parametrize(
    ("name", "num_loads"), [("select", 8), ("select_fp32", 16), ("decay", 8), ("dense", 8), ("update", 0)]
)
def test_dense_loads_are_vectors(kernels: Any, name: str, num_loads: int) -> None:
    assert CODE["count"](kernels[name], "LDG.E.128") >= num_loads


# Where the bulk prefetch is missing, each thread asks for a line.
@pytest.mark.parametrize(("name", "operation"), [("update", "UBLKPF"), ("dense_on_sm80", "CCTL")])
def test_parameters_are_asked_for_before_the_window_is_there(kernels: Any, name: str, operation: str) -> None:
    assert CODE["count"](kernels[name], operation) >= 1


# Two elements an instruction: a fused multiply-add for each pair to decode it and one to encode it, two additions, a
# comparison for each trip of the search, the ends of ranges.
@pytest.mark.parametrize(
    ("operations", "at_least"),
    [(("HFMA2.BF16",), 64), (("HADD2.BF16",), 32), (("HSET2",), 64), (("HMNMX2", "VHMNMX"), 32)],
)
def test_pairs_are_computed_at_once(kernels: Any, operations: tuple[str, ...], at_least: int) -> None:
    assert CODE["count"](kernels["select"], *operations) >= at_least


# A tensor that ranks share is in another launch than on one GPU, and may be aligned otherwise. The last bits agree
# where no variant fuses a product with a sum that another rounds apart.
@pytest.mark.parametrize(("name", "variant"), [("select", "select_tail"), ("update", "update_unaligned")])
@pytest.mark.parametrize("operation", ["FFMA", "FMUL", "FADD"])
def test_variants_round_alike(kernels: Any, name: str, variant: str, operation: str) -> None:
    assert CODE["count"](kernels[variant], operation) == CODE["count"](kernels[name], operation) > 0


# 64 elements a thread: the rare searches over all elements and their ties are two fifths of these.
@pytest.mark.parametrize(("name", "low", "high"), [("select", 1500, 2700), ("update", 600, 1100)])
def test_the_kernels_keep_within_their_instructions(kernels: Any, name: str, low: int, high: int) -> None:
    assert low < sum(kernels[name]["operations"].values()) < high
