"""Simulated steps: what the records of whole steps do not show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optplan.planner.catalog import load_model
from optplan.planner.dtypes import ITEMSIZE_BYTES
from optplan.planner.models.fields import Fields
from optplan.planner.models.registry import family_of
from optplan.planner.models.spec import ModelSpec
from optplan.planner.replay import replay
from optplan.planner.step.rules import StepOptions, write_forward_backward, write_load
from optplan.planner.step.simulation import ParameterStep, StepSimulator
from optplan.planner.timeline import TimelineBuilder

GPT2 = load_model("gpt2")
STATE = [p.numel * 2 for p in GPT2.unique_parameters for _ in range(2)]


def options(**changes: object) -> StepOptions:
    return StepOptions(**{"batch_size": 2, "seq_len": 256, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{}, {"grad_accum": 4}, {"checkpointing": "full"}, {"precision": "amp"}])
def test_blocks_hold_the_requests_and_little_more(changes: dict[str, object]) -> None:
    timeline = TimelineBuilder()
    write_load(timeline, GPT2, options(**changes))
    for num_bytes in STATE:
        timeline.alloc(num_bytes, "optimizer_state", "state")
    write_forward_backward(timeline, GPT2, options(**changes))
    sums = replay(timeline.events).phases
    result = StepSimulator(GPT2, options(**changes)).simulate(STATE, [])
    for phase in ("forward", "backward"):
        assert sums[phase] <= result.phases[phase] <= sums[phase] * 1.04
    assert result.reserved_bytes >= max(result.phases.values())


def test_what_is_alive_adds_up_to_the_peak() -> None:
    result = StepSimulator(GPT2, options()).simulate(STATE, [])
    assert sum(result.categories.values()) == result.phases[result.peak_phase]
    assert result.categories["optimizer_state"] >= sum(STATE)


def test_one_optimizer_leaves_nothing_behind_for_the_next() -> None:
    simulator = StepSimulator(GPT2, options())
    alone = simulator.simulate(STATE, [])
    simulator.simulate([10 * size for size in STATE], [])
    assert simulator.simulate(STATE, []) == alone


def test_temporaries_of_the_step_count_in_its_phase() -> None:
    step = TimelineBuilder("step")
    step.free(step.alloc(2**30, "optimizer_temporaries", "copy"))
    simulator = StepSimulator(GPT2, options())
    plain, larger = simulator.simulate(STATE, []), simulator.simulate(STATE, step.events)
    # To a thousandth: the segment that the copy leaves behind changes which blocks the second step finds.
    assert larger.phases["step"] == pytest.approx(plain.phases["step"] + 2**30, rel=0.001)
    assert larger.peak_phase == "step"
    assert larger.categories["optimizer_temporaries"] == 2**30
    assert larger.categories["gradients"] >= sum(p.numel * 2 for p in GPT2.unique_parameters)


def test_master_weights_are_resident() -> None:
    masters = [p.numel * ITEMSIZE_BYTES["float32"] for p in GPT2.unique_parameters]
    plain = StepSimulator(GPT2, options()).simulate(STATE, [])
    mixed = StepSimulator(GPT2, options(), master_bytes=masters).simulate(STATE, [])
    assert mixed.categories["master_weights"] >= sum(masters)
    assert max(mixed.phases.values()) - max(plain.phases.values()) == pytest.approx(sum(masters), rel=0.03)


MEASURED = [
    json.loads(line) for line in (Path(__file__).parents[2] / "records" / "h200_steps.jsonl").read_text().splitlines()
]
IN_BACKWARD = [row for row in MEASURED if row.get("step_in_backward") and "error" not in row]


def parameter_steps(spec: ModelSpec, row: dict[str, Any]) -> dict[str, ParameterStep]:
    """An AdamW for each parameter: its counter where fused, two moments, and where foreach what was measured of it."""
    itemsize = 2 if row["precision"] == "bf16" else 4
    steps = {}
    for parameter in spec.unique_parameters:
        size, step = parameter.numel * itemsize, TimelineBuilder("step")
        if row["optimizer"] == "adamw_foreach":
            step.free(step.alloc(size, "optimizer_temporaries", "root of the second moment"))
        counter = [4] if row["optimizer"] == "adamw" else []
        steps[parameter.name] = ParameterStep([*counter, size, size], step.events)
    return steps


@pytest.mark.parametrize("row", IN_BACKWARD, ids=lambda row: f"{row['model']}-{row['precision']}-{row['optimizer']}")
def test_a_step_taken_in_backward_peaks_as_measured(row: dict[str, Any]) -> None:
    spec = family_of("llama").spec(Fields(row["config"], where="row"), name="m", source="row")
    step = StepOptions(batch_size=row["batch"], seq_len=row["seq"], precision=row["precision"], step_in_backward=True)
    result = StepSimulator(spec, step).simulate_in_backward(parameter_steps(spec, row))
    measured = row["steps"][-1]
    for phase in ("forward", "backward"):
        assert result.phases[phase] == pytest.approx(measured[phase]["peak"], rel=0.002)
    # What is left: parameters, moments, token ids and workspaces, but no gradient.
    assert result.phases["step"] == pytest.approx(measured["backward"]["cur"], rel=0.002)
    assert result.reserved_bytes == row["reserved"]


def test_clipping_takes_norms_but_no_copy() -> None:
    plain, clipped = (StepSimulator(GPT2, options(), clips=clips).simulate(STATE, []) for clips in (False, True))
    # 148 gradients: their norms and seven more scalars and lists at 512 bytes each at the most.
    assert 0 < clipped.phases["clip"] - plain.phases["step"] <= (148 + 7) * 512 + 148 * 590 * 4
    assert "clip" not in plain.phases


def test_an_emptied_cache_does_not_move_the_allocated_peak() -> None:
    plain, emptied = (
        StepSimulator(GPT2, options(), empties_cache=empties).simulate(STATE, []) for empties in (False, True)
    )
    assert emptied.phases["backward"] == pytest.approx(plain.phases["backward"], rel=0.001)
    assert emptied.reserved_bytes >= max(emptied.phases.values())


def test_kept_gradients_are_there_from_the_start() -> None:
    plain, kept = (StepSimulator(GPT2, options(keep_grads=keeps)).simulate(STATE, []) for keeps in (False, True))
    gradients = sum(p.numel * 2 for p in GPT2.unique_parameters)
    assert gradients <= kept.phases["forward"] - plain.phases["forward"] <= 1.05 * gradients
