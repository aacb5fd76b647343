"""The steady step event by event adds up to the peaks that the simulation finds."""

from __future__ import annotations

from typing import Any

import pytest

from optplan.planner.candidates import choose_optimizers
from optplan.planner.catalog import load_model
from optplan.planner.request import check_request
from optplan.planner.timeline_report import categories_of
from optplan.planner.workload import Workload

CASES: list[dict[str, Any]] = [
    {},
    {"grad_accum": 4},
    {"keep_grads": True},
    {"step_in_backward": True},
    {"clip_grad_norm": 1.0},
    {"checkpointing": "full"},
    {"precision": "mixed"},
    {"empty_cache": True},
]


@pytest.mark.parametrize("flags", CASES, ids=str)
@pytest.mark.parametrize("optimizer", ["adamw", "adam-mini", "adapprox"])
def test_the_history_has_the_simulation_s_peak(flags: dict[str, Any], optimizer: str) -> None:
    workload = Workload(check_request(load_model("gpt2"), gpu="a100-80g", seq_len=128, **flags))
    (candidate,), _ = workload.candidates(choose_optimizers(optimizer))
    peaks, history = workload.peaks(candidate), workload.history(candidate)
    assert peaks is not None and history is not None
    alive = history.alive(history.peak_event)
    assert max(history.allocated) == peaks.peak_bytes == sum(tensor.bytes for tensor in alive)
    assert {name: size for name, size in categories_of(alive).items() if size} == peaks.categories
    assert sum(tensor.bytes for tensor in history.resident) == history.allocated[0]
    assert history.reserved_bytes == peaks.reserved_bytes


def test_state_tensors_carry_their_names() -> None:
    workload = Workload(check_request(load_model("gpt2"), gpu="a100-80g", seq_len=128))
    (candidate,), _ = workload.candidates(choose_optimizers("adamw"))
    history = workload.history(candidate)
    assert history is not None
    names = {tensor.name for tensor in history.resident if tensor.category == "optimizer_state"}
    assert {"transformer.wte.weight exp_avg", "transformer.wte.weight exp_avg_sq"} <= names
