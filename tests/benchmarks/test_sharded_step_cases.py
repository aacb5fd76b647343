"""The steps that two GPUs are to take: each can be asked for, fits, and together they cover what there is."""

from __future__ import annotations

import argparse
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from optplan.planner.candidates import choose_optimizers
from optplan.planner.catalog import load_model
from optplan.planner.request import check_request
from optplan.planner.workload import Workload
from optplan.profilers.live.sharded import PROFILED_SHARDINGS

PATH = Path(__file__).parents[2] / "benchmarks" / "sharded_step_cases.toml"
CASES: list[dict[str, Any]] = tomllib.loads(PATH.read_text(encoding="utf-8"))["case"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_step_fits_on_two_h200s(case: dict[str, Any]) -> None:
    request = check_request(load_model(case["model"]), gpu="h200", gpus=2, nodes=1, **case["step"])
    assert request.config.sharding in PROFILED_SHARDINGS
    workload = Workload(request)
    (candidate,), skipped = workload.candidates(choose_optimizers(case.get("optimizer", "adamw"), case.get("options")))
    assert not skipped
    assert workload.fits(candidate)


def test_the_cases_are_enough_and_of_every_kind() -> None:
    assert len({case["name"] for case in CASES}) == len(CASES) >= 12
    assert {case["step"]["sharding"] for case in CASES} == set(PROFILED_SHARDINGS)
    ours = {case.get("optimizer", "adamw") for case in CASES if case["step"]["sharding"] == "fsdp2"}
    assert ours == {"adamw", "adam-mini", "micro-adam", "adapprox"}
    assert any(case.get("options") == {"implementation": "optplan"} for case in CASES)


GOOD = {"rank": 0, "losses": [2.0, 1.5], "seconds": 3, "figures": {"peak_allocated_bytes": 1024, "out_of_memory": None}}
OUT = {"out_of_memory": {"phase": "forward", "message": "tried to allocate 8 GiB"}}


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([GOOD, GOOD | {"rank": 1}], "peak 1,024 B, losses 2.0000 to 1.5000 in 3 s"),
        ([GOOD], "1 of 2 ranks told anything"),
        ([GOOD, {"rank": 1, "error": "ValueError: bad"}], "rank 1: ValueError: bad"),
        ([{"rank": 0, "out_of_memory": "tried"}, GOOD], "rank 0: tried"),
        ([GOOD | {"losses": [], "figures": OUT}, GOOD], "rank 0: out of memory in forward: tried to allocate 8 GiB"),
    ],
)
def test_a_case_that_fails_is_saved_with_what_its_ranks_say(ranks: list[dict[str, Any]], text: str) -> None:
    sys.path.insert(0, str(PATH.parent))
    import record_sharded_steps

    row = record_sharded_steps.row_of(CASES[0], ranks, argparse.Namespace(ranks=2, predict=False))
    assert record_sharded_steps.verdict(row) == text
