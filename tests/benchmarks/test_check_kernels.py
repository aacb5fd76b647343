"""What the kernel checks read out of NVIDIA's tools, and the page of it."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks" / "check_kernels.py"))
METRICS = (
    '"gpu__time_duration.sum","dram__throughput.avg.pct_of_peak_sustained_elapsed","dram__bytes.sum",'
    '"sm__inst_issued.avg.pct_of_peak_sustained_active","launch__registers_per_thread",'
    '"sm__warps_active.avg.pct_of_peak_sustained_active"'
)
NCU = f"""==PROF== Connected to process 12
==PROF== Disconnected from process 12
"ID","Process ID","Kernel Name","Block Size","Grid Size",{METRICS}
"","","","","","us","%","Mbyte","%","register/thread","%"
"0","12","spin_kernel(long)","(1, 1, 1)","(1, 1, 1)","1.92","0.0","0.01","1.0","16","3.1"
"1","12","rows_kernel","(256, 1, 1)","(4,096, 1, 1)","112.5","88.25","451.2","31.5","56","61.0"
"""


def test_a_profile_is_read_in_seconds_and_bytes() -> None:
    marker, launch = SCRIPT["read_launches"](NCU)
    assert marker["kernel"] == "spin_kernel(long)"
    assert launch == {
        "kernel": "rows_kernel", "grid": "(4,096, 1, 1)", "block": "(256, 1, 1)",
        "seconds": pytest.approx(112.5e-6), "dram_throughput_percent": 88.25, "dram_bytes": pytest.approx(451.2e6),
        "issue_slots_busy_percent": 31.5, "registers": 56.0, "occupancy_percent": 61.0,
    }  # fmt: skip


def test_a_profile_of_nothing_is_empty() -> None:
    assert SCRIPT["read_launches"]("==ERROR== The application returned an error code (1).\n") == []


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        ("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", 0),
        ("========= Invalid __global__ read of size 4 bytes\n========= ERROR SUMMARY: 3 errors\n", 3),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n", 2),
        ("========= COMPUTE-SANITIZER\nDevice not supported\n", None),
    ],
)
def test_errors_are_counted(text: str, errors: int | None) -> None:
    assert SCRIPT["count_errors"](text) == errors


def test_every_kind_of_block_of_adam_mini_is_checked() -> None:
    from optplan.planner.optimizers.adam_mini_blocks import blocks_of
    from optplan.planner.optimizers.adam_mini_work import pieces

    kinds = {piece.kind for described in SCRIPT["small_tensors"]("adam-mini") for piece in pieces(blocks_of(described))}
    assert kinds == {"elements", "rows", "segments", "columns"}
