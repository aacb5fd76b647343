"""The steps that two GPUs are to take: each can be asked for, fits, and together they cover what there is."""

from __future__ import annotations

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
    assert workload.surely_fits(candidate, request.config.batch_size)


def test_the_cases_are_enough_and_of_every_kind() -> None:
    assert len({case["name"] for case in CASES}) == len(CASES) >= 12
    assert {case["step"]["sharding"] for case in CASES} == set(PROFILED_SHARDINGS)
    ours = {case.get("optimizer", "adamw") for case in CASES if case["step"]["sharding"] == "fsdp2"}
    assert ours == {"adamw", "adam-mini", "micro-adam", "adapprox"}
    assert any(case.get("options") == {"implementation": "optplan"} for case in CASES)
