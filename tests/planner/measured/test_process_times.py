"""Records held against the time of their step over all processes that took it, on the host of those processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from optplan.planner.estimate import estimate
from optplan.planner.expected_step import expected_side
from optplan.planner.measured.expectation import expect, hold_against_rules
from optplan.planner.measured.measurement import Environment, Measurement, StepTime
from optplan.planner.measured.record_files import save_record
from optplan.planner.measured.validation import Judgement, Spread, judge, validate_records
from optplan.planner.records import EstimateReport
from optplan.planner.step_time_rates import load_time_model
from optplan.planner.step_timer import host_note

REPORT: EstimateReport = estimate(
    "gpt2", gpu="h200-141g", optimizer="adamw", options={"implementation": "for-loop"}, seq_len=128
)
"""Of a step that the host's launches decide."""


@pytest.fixture
def plain_seconds() -> float:
    """Its time on the host of a plain estimate."""
    seconds = REPORT.estimates[0].step_seconds
    assert seconds is not None
    return seconds["step"]


@pytest.fixture
def launch_seconds() -> float:
    """What that host takes to launch one operation."""
    found = load_time_model().host.launch_reference_seconds
    assert found is not None
    return found


def measured(seconds: float | None, launch_seconds: float | None) -> Measurement:
    """A record whose bytes are as predicted."""
    row = REPORT.estimates[0]
    time = StepTime(step_seconds=seconds, phases={}, num_steps=5, host_launch_seconds=launch_seconds)
    return Measurement(
        version="0.1.0",
        source="live",
        model=REPORT.model,
        gpu=REPORT.gpu,
        config=REPORT.config,
        optimizer=row.optimizer,
        implementation=row.implementation,
        options=row.options,
        bytes=row.bytes,
        state_tensors=row.state_tensors,
        time=time,
        environment=Environment(python="3.12", optplan="0.1.0", command="test", date="2026-11-22T00:00:00Z"),
    )


def line(record: str, seconds: float, launch_seconds: float | None) -> str:
    fields: dict[str, Any] = {
        "schema": "optplan.step-times/1", "record": record, "step_seconds": seconds, "phases": {}, "num_steps": 5,
        "host_launch_seconds": [launch_seconds], "environment": {},
    }  # fmt: skip
    return json.dumps(fields) + "\n"


def test_a_record_is_predicted_for_its_own_host(plain_seconds: float, launch_seconds: float) -> None:
    row = judge(measured(3 * plain_seconds, 2 * launch_seconds), name="slow")
    # Twice the launches' time is twice the step's: 2 / 3 - 1 of what was measured.
    assert row.step_seconds_error == pytest.approx(-1 / 3, abs=1e-3)
    assert (row.step_seconds, row.num_processes, row.step_seconds_spread) == (3 * plain_seconds, 1, [])
    assert row.host_launch_seconds == 2 * launch_seconds


def test_a_record_that_does_not_tell_is_predicted_for_the_host_of_an_estimate(plain_seconds: float) -> None:
    row = judge(measured(plain_seconds / 2, None), name="untold")
    assert row.step_seconds_error == pytest.approx(1.0)
    assert row.host_launch_seconds is None


def test_what_stands_beside_a_record_says_which_host_it_is_for(plain_seconds: float, launch_seconds: float) -> None:
    record = measured(plain_seconds, 1.5 * launch_seconds)
    note = host_note(1.5 * launch_seconds)
    comparison = hold_against_rules(record)
    whole = next(row for row in comparison.rows if row.name == "whole step")
    assert whole.values == [plain_seconds, pytest.approx(1.5 * plain_seconds, rel=1e-3)]
    assert comparison.notes == [f"predicted by rules: {note}"]
    assert (expected_side(record).step_seconds, expected_side(record).notes) == (whole.values[1], [note])
    assert expect(record).notes[-1] == note
    assert hold_against_rules(measured(plain_seconds, None)).notes == []
    assert expected_side(measured(plain_seconds, None)).step_seconds == pytest.approx(plain_seconds)


def test_steps_are_judged_over_all_processes_that_took_them(
    tmp_path: Path, plain_seconds: float, launch_seconds: float
) -> None:
    save_record(measured(2.0 * plain_seconds, 1.0 * launch_seconds), tmp_path / "often.json.gz")
    save_record(measured(1.0 * plain_seconds, 1.0 * launch_seconds), tmp_path / "once.json.gz")
    times = [(1.0, 2.0), (1.6, 3.0), (5.0, None)]
    lines = [line("often", seconds * plain_seconds, launch and launch * launch_seconds) for seconds, launch in times]
    (tmp_path / "step_times.jsonl").write_text("".join(lines))
    report = validate_records(tmp_path.iterdir())
    assert report.skipped == {}
    often, once = sorted(report.judgements, key=lambda row: -row.num_processes)
    # Processes took 2, 1, 1.6 and 5 times the plain prediction: 1.8 in the median. Of three hosts that told theirs, the
    # mean takes (1 + 2 + 3) / 3 = 2 times as long.
    assert (often.record, often.num_processes) == ("often", 4)
    assert often.step_seconds == pytest.approx(1.8 * plain_seconds)
    assert often.host_launch_seconds == pytest.approx(2 * launch_seconds)
    assert often.step_seconds_error == pytest.approx(2 / 1.8 - 1, abs=2e-3)
    assert often.step_seconds_spread == pytest.approx([2 / 1.8 - 1, 1 / 1.8 - 1, 1.6 / 1.8 - 1, 5 / 1.8 - 1])
    assert (once.num_processes, once.step_seconds_spread) == (1, [])
    assert once.step_seconds_error == pytest.approx(0.0, abs=1e-9)
    spread = next(spread for spread in report.spreads if spread.metric == "step_seconds_spread")
    # Of 0.2, 0.8, 0.2 and 3.2 over 1.8.
    assert spread == Spread("step_seconds_spread", 1, pytest.approx(0.5 / 1.8), pytest.approx(3.2 / 1.8), "often")  # type: ignore[arg-type]
    assert [one.count for one in report.spreads if one.metric == "step_seconds_error"] == [2]


def test_two_processes_are_no_spread(tmp_path: Path, plain_seconds: float) -> None:
    save_record(measured(plain_seconds, None), tmp_path / "twice.json.gz")
    (tmp_path / "step_times.jsonl").write_text(line("twice", 2 * plain_seconds, None))
    report = validate_records([tmp_path / "twice.json.gz"])
    assert [(row.num_processes, row.step_seconds_spread) for row in report.judgements] == [(2, [])]
    assert not [spread for spread in report.spreads if spread.metric == "step_seconds_spread"]


def test_damaged_times_are_told_of_and_keep_nothing_from_being_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain_seconds: float
) -> None:
    monkeypatch.chdir(tmp_path)
    save_record(measured(plain_seconds, None), "step.json.gz")
    Path("step_times.jsonl").write_text('{"schema": "optplan.step-times/1"}\n')
    report = validate_records(["step.json.gz"])
    assert [(row.record, row.num_processes) for row in report.judgements] == [("step", 1)]
    assert report.skipped == {
        "step_times.jsonl": "'step_times.jsonl' cannot be read as times of steps: "
        "Object missing required field `record` - at `$[0]`"
    }


def test_an_earlier_validation_is_still_read(plain_seconds: float) -> None:
    row = msgspec.to_builtins(judge(measured(plain_seconds, None), name="old"))
    for name in ("step_seconds", "num_processes", "step_seconds_spread", "host_launch_seconds"):
        del row[name]
    read = msgspec.convert(row, Judgement)
    assert (read.step_seconds, read.num_processes, read.step_seconds_spread) == (None, 0, [])
