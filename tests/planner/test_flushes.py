"""Steps that fit because the allocator gives its cache back: how often they have to, and what spares it."""

from __future__ import annotations

from typing import Any

import pytest

from optplan.planner.allocator.settings import AllocatorSettings
from optplan.planner.candidates import choose_optimizers
from optplan.planner.catalog import load_model
from optplan.planner.estimate import estimate
from optplan.planner.flushes import flush_note
from optplan.planner.request import check_request
from optplan.planner.search.recommend import recommend
from optplan.planner.step.simulated_device import SimulatedDevice, SimulatedEvent
from optplan.planner.step_timeline import timeline
from optplan.planner.workload import Workload

MIB = 2**20
SHARDED: dict[str, Any] = {"precision": "mixed", "checkpointing": "full", "sharding": "fsdp2"}
LARGEST: dict[str, Any] = {"gpu": "h100", "gpus": 192, **SHARDED}
WHAT_IT_COSTS = (
    "in a steady step a request finds no room until the allocator has given its cache back (torch's "
    "num_alloc_retries): each time the host waits for the GPU, which slows the step and is in no predicted time"
)


def note(model: str, *, tries_changes: bool = True, **step: Any) -> str | None:
    workload = Workload(check_request(load_model(model), **step))
    (candidate,), _ = workload.candidates(choose_optimizers("adamw"))
    return flush_note(workload, candidate, tries_changes=tries_changes)


@pytest.mark.parametrize(
    ("allowed_mib", "flushes"),
    [
        (None, 0),
        # 30 MiB are cached: 40 more are too many for 64, until the 30 are given back; 70 hold both.
        (64, 1),
        (70, 0),
    ],
)
def test_a_request_that_only_the_cache_has_room_for_counts_once(allowed_mib: int | None, flushes: int) -> None:
    allowed_bytes = None if allowed_mib is None else allowed_mib * MIB
    device = SimulatedDevice(AllocatorSettings(), allowed_bytes=allowed_bytes)
    small = SimulatedEvent(1, 30 * MIB, "activations", "forward", "small")
    large = SimulatedEvent(2, 40 * MIB, "activations", "forward", "large")
    device.run([small, small._replace(id=-1), large, large._replace(id=-2)])
    assert device.num_flushes == flushes


@pytest.mark.parametrize(
    ("model", "step", "sentence"),
    [
        (
            "llama-3.1-405b", LARGEST,
            f"fits, but 251 times {WHAT_IT_COSTS}; with --alloc-conf expandable_segments:True it is 5 times",
        ),
        (
            "llama-3.1-8b", {"gpu": "h100", "gpus": 4, "batch_size": 12, **SHARDED},
            f"fits, but 2 times {WHAT_IT_COSTS}; with --alloc-conf expandable_segments:True it is once; with "
            "--batch-size 6 --grad-accum 2 it does not happen",
        ),
        (
            "llama-3.1-70b", {"gpu": "a100-40g", "gpus": 64, **SHARDED},
            f"fits, but 3 times {WHAT_IT_COSTS}; with --alloc-conf expandable_segments:True it is once; with 96 GPUs "
            "on 12 nodes it does not happen",
        ),
    ],
)  # fmt: skip
def test_the_note_says_how_often_what_it_costs_and_what_spares_it(
    model: str, step: dict[str, Any], sentence: str
) -> None:
    assert note(model, **step) == sentence


@pytest.mark.parametrize(
    ("model", "step", "begins"),
    [
        ("llama-3.1-405b", {**LARGEST, "alloc_conf": "expandable_segments:True"}, f"fits, but 5 times {WHAT_IT_COSTS}"),
        (
            "llama-3.1-8b",
            {"gpu": "h100", "gpus": 4, "batch_size": 12, **SHARDED, "alloc_conf": "expandable_segments:True"},
            f"fits, but once {WHAT_IT_COSTS}",
        ),
        ("llama-3.1-8b", {"gpu": "h100", "gpus": 4, "batch_size": 6, "grad_accum": 2, **SHARDED}, None),
        ("llama-3.1-70b", {"gpu": "a100-40g", "gpus": 96, **SHARDED}, None),
    ],
)
def test_a_change_that_is_named_does_what_is_said(model: str, step: dict[str, Any], begins: str | None) -> None:
    assert note(model, tries_changes=False, **step) == begins


@pytest.mark.parametrize(
    "step",
    [
        {"gpu": "a100-40g"},
        # Refused by bytes, and refused by fragmentation.
        {"gpu": "rtx-4090-24g", "batch_size": 64},
        {"gpu": "h100", "gpus": 184, **SHARDED},
    ],
)
def test_other_steps_have_no_note(step: dict[str, Any]) -> None:
    assert note("llama-3.1-405b" if "gpus" in step else "gpt2", **step) is None


def test_without_simulations_within_the_limit_the_number_is_not_known() -> None:
    class Unlimited(Workload):
        simulates_limit = False

    workload = Unlimited(check_request(load_model("llama-3.1-405b"), **LARGEST))
    (candidate,), _ = workload.candidates(choose_optimizers("adamw"))
    assert workload.num_flushes(candidate) is None


def test_estimates_and_timelines_say_so_beside_their_verdict() -> None:
    step = {"gpu": "h100", "gpus": 4, "batch_size": 12, **SHARDED}
    sentence = (
        f"fits, but 2 times {WHAT_IT_COSTS}; with --alloc-conf expandable_segments:True it is once; with --batch-size "
        "6 --grad-accum 2 it does not happen"
    )
    assert estimate("llama-3.1-8b", optimizer="adamw", **step).estimates[0].notes == [sentence]
    assert timeline("llama-3.1-8b", **step).notes[0] == f"the step {sentence}"
    among_others = estimate("llama-3.1-8b", optimizer=["adamw", "micro-adam"], **step).estimates
    assert among_others[0].notes == [f"fits, but 2 times {WHAT_IT_COSTS}"]


def test_a_recommendation_says_so() -> None:
    report = recommend("llama-3.1-405b", optimizer="adamw", gpu="h100", gpus=192, precision="mixed")
    assert report.recommendation is not None
    assert report.recommendation.verdict == "tight"
    assert report.notes[-1] == (
        f"the step fits, but 251 times {WHAT_IT_COSTS}; with --alloc-conf expandable_segments:True it is 6 times"
    )
