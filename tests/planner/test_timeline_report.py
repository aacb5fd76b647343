"""The curve of a step and what is alive at its peak, on a step small enough to follow by hand."""

import pytest

from optplan.planner.replay import LiveTensor
from optplan.planner.step_history import PhaseSpan, StepHistory
from optplan.planner.timeline import Allocation, Free
from optplan.planner.timeline_report import curve, largest

WEIGHT = LiveTensor("weight", "parameters", 1024)
EVENTS = [
    Allocation(2, 500, "activations", "hidden", "forward"),
    Allocation(3, 1000, "logits_and_loss", "logits", "forward"),
    Free(2, "backward"),
    Allocation(4, 600, "gradients", "weight gradient", "backward"),
    Free(3, "backward"),
    Allocation(5, 2048, "optimizer_temporaries", "update", "step"),
    Free(5, "step"),
]
ALLOCATED = [1024, 1536, 2560, 2048, 3072, 2048, 4096, 2048]


@pytest.fixture
def history() -> StepHistory:
    return StepHistory([WEIGHT], EVENTS, ALLOCATED, 2**21)


def test_the_peak_is_the_first_event_that_reaches_it(history: StepHistory) -> None:
    assert history.peak_event == 6


def test_alive_at_the_peak_with_the_bytes_of_the_blocks(history: StepHistory) -> None:
    assert history.alive(6) == [
        WEIGHT,
        LiveTensor("weight gradient", "gradients", 1024),
        LiveTensor("update", "optimizer_temporaries", 2048),
    ]
    assert [tensor.name for tensor in largest(history.alive(6), count=2)] == ["update", "weight"]


def test_a_phase_begins_with_what_the_one_before_has_left(history: StepHistory) -> None:
    assert history.spans() == [
        PhaseSpan("forward", 1, 2, 2560),
        PhaseSpan("backward", 3, 5, 3072),
        PhaseSpan("step", 6, 7, 4096),
    ]


def test_the_curve_adds_up_at_every_moment(history: StepHistory) -> None:
    points = curve(history)
    assert [point.allocated_bytes for point in points] == ALLOCATED
    assert all(sum(point.categories.values()) == point.allocated_bytes for point in points)
    assert points[3].categories == {"parameters": 1024, "logits_and_loss": 1024}
    assert [point.name for point in points] == ["", "hidden", "logits", "hidden", "weight gradient", "logits"] + [
        "update"
    ] * 2


@pytest.mark.parametrize("num_points", [1, 2, 3, 7])
def test_a_shortened_curve_keeps_the_peak(history: StepHistory, num_points: int) -> None:
    points = curve(history, num_points=num_points)
    assert len(points) == num_points
    assert max(point.allocated_bytes for point in points) == 4096
