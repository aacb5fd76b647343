"""Simulated steps: what the records of whole steps do not show."""

from __future__ import annotations

import pytest

from optplan.planner.catalog import load_model
from optplan.planner.dtypes import ITEMSIZE_BYTES
from optplan.planner.replay import replay
from optplan.planner.step.rules import StepOptions, write_forward_backward, write_load
from optplan.planner.step.simulation import StepSimulator
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
