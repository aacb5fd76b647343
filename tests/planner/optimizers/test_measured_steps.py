"""Every optimizer's state and step against real ones on an H200, allocation by allocation.

The records hold three models (two Llamas, of which one layer of Llama-2-7B, and a GPT-2 of odd sizes) in both dtypes;
`benchmarks/record_optimizers.py` made them with torch 2.11. The official MicroAdam ran on the kernels of
ista-daslab-optimizers-cuda 1.1.0, built from source. cuBLAS's workspace is allocated before the step that is recorded.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from optplan.planner.models.reader import read_model
from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel
from optplan.planner.optimizers.registry import OPTIMIZERS, build_optimizer
from optplan.planner.tensors import Parameter
from optplan.planner.timeline import Allocation, TimelineBuilder

RECORDS = Path(__file__).parents[2] / "records" / "h200_optimizers.jsonl"
ROWS: list[dict[str, Any]] = [json.loads(line) for line in RECORDS.read_text().splitlines()]

NOT_RECORDED = {
    ("soap", "official"): "a file in a repository, no package",
    ("paged-adamw-8bit", "bitsandbytes"): "its moments are managed memory, which torch's allocator does not see",
}
WORKSPACE_SLACK_BYTES = 300
"""The workspace of cuSOLVER's SVD is fitted; no peak of these rows depends on it."""


def _name(row: dict[str, Any]) -> str:
    options = [f"{key}={value}" for key, value in row["options"].items()]
    return "-".join([row["optimizer"], *options, row["model"], row["dtype"]])


def _setting(row: dict[str, Any]) -> tuple[OptimizerModel, tuple[Parameter, ...], OptimizerContext]:
    parameters = read_model(row["config"], name=row["model"], source="recorded", where="config").unique_parameters
    model = build_optimizer(row["optimizer"], row["options"]).bind(parameters)
    return model, parameters, OptimizerContext(row["dtype"], row["dtype"])


def _said_events(row: dict[str, Any]) -> list[int]:
    """The step's allocations as their bytes, its frees as minus theirs."""
    model, parameters, context = _setting(row)
    builder = TimelineBuilder("step")
    model.write_step(builder, parameters, context)
    sizes = {event.id: event.bytes for event in builder.events if isinstance(event, Allocation)}
    events = [sizes[event.id] * (1 if isinstance(event, Allocation) else -1) for event in builder.events]
    return [size for size in events if size]


def _in_order(events: list[int]) -> list[int]:
    """Sort the frees between two allocations, whose order no peak depends on."""
    ordered: list[int] = []
    frees: list[int] = []
    for size in events:
        if size < 0:
            frees.append(size)
        else:
            ordered += [*sorted(frees), size]
            frees = []
    return ordered + sorted(frees)


@pytest.mark.parametrize("row", ROWS, ids=_name)
def test_state_equals_the_measured_one(row: dict[str, Any]) -> None:
    model, parameters, context = _setting(row)
    assert model.unsupported_reason(parameters, context) is None
    states = [state for parameter in parameters for state in model.state(parameter, context)]
    found: dict[str, Counter[str]] = {"device": Counter(), "cpu": Counter()}
    for state in (*states, *model.shared_state(parameters, context)):
        found[state.device][state.name] += state.num_bytes
    # FlashAdamW's checkpoints, whose names the model gives, write `exp_avg::scales` for the attribute `_scales`.
    measured = {
        device: {name.replace("._", "::"): size for name, size in row["state"].get(place, {}).items()}
        for device, place in (("device", "cuda"), ("cpu", "cpu"))
    }
    assert found == measured


@pytest.mark.parametrize("row", ROWS, ids=_name)
def test_step_equals_the_measured_one(row: dict[str, Any]) -> None:
    said, measured = _said_events(row), row["step"]["events"]
    assert max(accumulate(said), default=0) == row["step"]["peak_requested_bytes"]
    if row["optimizer"] == "galore":
        assert len(said) == len(measured)
        pairs = zip(*(sorted(size for size in events if size > 0) for events in (said, measured)), strict=True)
        assert all(abs(mine - theirs) <= WORKSPACE_SLACK_BYTES for mine, theirs in pairs)
    else:
        assert _in_order(said) == _in_order(measured)


def test_every_implementation_that_is_not_ours_is_recorded() -> None:
    recorded = {(row["optimizer"], build_optimizer(row["optimizer"], row["options"]).implementation) for row in ROWS}
    every = {(entry.id, kind) for entry in OPTIMIZERS.values() for kind in entry.implementations if kind != "optplan"}
    assert every - recorded == set(NOT_RECORDED)


def test_steps_with_matrix_products_keep_one_workspace_of_cublas_and_nothing_else() -> None:
    kept = {row["optimizer"]: row["kept_besides_bytes"] for row in ROWS if row["kept_besides_bytes"]}
    assert set(kept) >= {"muon", "galore", "apollo", "soap"}
    assert set(kept.values()) == {32 * 2**20}
