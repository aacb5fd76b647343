"""Records beside each other: differences in bytes, the first event that differs, names at the peak."""

import msgspec
import pytest

from optplan.planner.errors import ConfigError
from optplan.planner.estimate import estimate
from optplan.planner.measured.comparison import ComparedRow, Comparison, EventDifference, TensorDifference, compare
from optplan.planner.measured.sides import Side, side_of_estimate
from optplan.planner.records import ResidentBytes, StepConfig
from optplan.planner.replay import LiveTensor
from optplan.planner.step_history import StepHistory
from optplan.planner.timeline import Allocation, Free

CONFIG = StepConfig("bf16", 1, 1024, 1, "none", "sdpa", 1, "none")
RESIDENT = [LiveTensor("weight", "parameters", 1024)]


def _history(temporary_bytes: int) -> StepHistory:
    block = -(-temporary_bytes // 512) * 512
    events = [
        Allocation(2, 900, "activations", "hidden", "forward"),
        Allocation(3, temporary_bytes, "activations", "gate", "forward"),
        Free(3, "backward"),
    ]
    return StepHistory(RESIDENT, events, [1024, 2048, 2048 + block, 2048], 2**21)


MEASURED = Side(
    label="measured",
    source="live",
    model="gpt2",
    optimizer="adamw",
    implementation="fused",
    config=CONFIG,
    details={},
    bytes=ResidentBytes(1000, 1000, 0, 2004),
    state_tensors={"exp_avg": 1000, "exp_avg_sq": 1000, "step": 4},
    phases={"forward": 3072},
    categories={"parameters": 1024, "activations": 1536},
    peak_allocated_bytes=3072,
    step_seconds=0.5,
    history=_history(1000),
)
PREDICTED = msgspec.structs.replace(
    MEASURED,
    label="predicted",
    source="rules",
    state_tensors={"exp_avg": 1000, "exp_avg_sq": 1000},
    phases={"forward": 3584},
    categories={"parameters": 1024, "activations": 2560},
    peak_allocated_bytes=3584,
    step_seconds=None,
    history=_history(1500),
)


@pytest.fixture
def comparison() -> Comparison:
    return compare([PREDICTED, MEASURED])


def _row(comparison: Comparison, section: str, name: str) -> ComparedRow:
    return next(row for row in comparison.rows if (row.section, row.name) == (section, name))


def test_the_measurement_is_the_reference(comparison: Comparison) -> None:
    assert comparison.reference == 1
    assert compare([PREDICTED, PREDICTED]).reference == 0


def test_differences_are_from_the_reference(comparison: Comparison) -> None:
    assert _row(comparison, "phases", "forward") == ComparedRow("phases", "forward", "bytes", [3584, 3072], [512, 0])
    assert _row(comparison, "phases", "forward").fraction(0, 1) == pytest.approx(1 / 6)


def test_a_state_that_only_one_side_has_counts_as_none_of_it(comparison: Comparison) -> None:
    assert _row(comparison, "state", "step").values == [0, 4]
    assert _row(comparison, "state", "step").differences == [-4, 0]


def test_what_no_category_has_is_a_row_of_its_own(comparison: Comparison) -> None:
    assert _row(comparison, "peak", "unexplained").values == [0, 512]


def test_a_side_that_does_not_say_has_no_difference(comparison: Comparison) -> None:
    assert _row(comparison, "time", "whole step").values == [None, 0.5]
    assert _row(comparison, "time", "whole step").differences == [None, 0.0]


def test_rows_that_no_side_has_are_left_out(comparison: Comparison) -> None:
    assert not [row for row in comparison.rows if row.name == "device_bytes"]


def test_the_optimizers_time_is_the_phase_step_on_both_sides() -> None:
    report = estimate("gpt2", gpu="h200", optimizer="adamw")
    (row,) = report.estimates
    assert row.step_seconds is not None
    predicted = side_of_estimate(report, row, label="predicted")
    measured = msgspec.structs.replace(MEASURED, phase_seconds={"forward": 0.2, "backward": 0.2, "step": 0.1})
    found = compare([measured, predicted])
    assert _row(found, "time", "whole step").values == [0.5, row.step_seconds["step"]]
    assert _row(found, "time", "step").values == [0.1, row.step_seconds["optimizer"]]
    assert [row.name for row in found.rows if row.section == "time"] == ["whole step", "forward", "backward", "step"]


def test_how_fast_the_host_launched_is_shown_where_it_was_measured() -> None:
    # 12.5 microseconds an operation are 80,000 a second.
    found = compare([msgspec.structs.replace(MEASURED, host_launch_seconds=12.5e-6), PREDICTED])
    assert _row(found, "time", "host_launches_per_second").values == [pytest.approx(80_000), None]
    assert not [row for row in compare([MEASURED, PREDICTED]).rows if row.name == "host_launches_per_second"]


def test_the_first_event_that_differs(comparison: Comparison) -> None:
    assert comparison.events == [
        EventDifference(0, 2, 1, "forward: allocates 1,000 B for gate", "forward: allocates 1,500 B for gate")
    ]


def test_a_step_that_ends_early() -> None:
    short = StepHistory(RESIDENT, _history(1000).events[:2], [1024, 2048, 3072], 2**21)
    (difference,) = compare([MEASURED, msgspec.structs.replace(MEASURED, label="short", history=short)]).events
    assert difference == EventDifference(1, 3, 2, "backward: frees gate", None)


def test_names_that_differ_at_the_peak(comparison: Comparison) -> None:
    assert comparison.tensors == [TensorDifference("gate", "activations", [1536, 1024])]


def test_equal_sides_differ_nowhere() -> None:
    same = compare([MEASURED, msgspec.structs.replace(MEASURED, label="again")])
    assert (same.events, same.tensors, same.notes) == ([], [], [])
    assert all(difference == 0 for row in same.rows for difference in row.differences)


def test_sides_of_different_steps_are_said_to_be() -> None:
    config = msgspec.structs.replace(CONFIG, batch_size=2)
    other = msgspec.structs.replace(MEASURED, label="other", config=config, optimizer="adam-mini", implementation="x")
    assert compare([MEASURED, other]).notes == [
        "other is of another step than measured: optimizer adamw (fused) -> adam-mini (x), batch_size 1 -> 2"
    ]


def test_one_record_is_no_comparison() -> None:
    with pytest.raises(ConfigError, match=r"^a comparison needs at least two records, got 1$"):
        compare([MEASURED])
