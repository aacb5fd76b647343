"""Measurements held against the rules: errors are what was put in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from optplan.planner.estimate import estimate
from optplan.planner.measured.measurement import Environment, Measurement, OutOfMemory, StepTime
from optplan.planner.measured.record_files import save_record
from optplan.planner.measured.validation import judge, validate_records
from optplan.planner.records import PhasePeak
from optplan.planner.workload import StepPeaks


def _measured(**changes: Any) -> Measurement:
    """What a measurement would be if the rules were right, with some figures changed."""
    report = estimate("gpt2", gpu="h200-141g", optimizer="adamw", seq_len=128)
    row = report.estimates[0]
    assert row.phases is not None and row.peak_categories is not None
    record = Measurement(
        version="0.1.0",
        source="live",
        model=report.model,
        gpu=report.gpu,
        config=report.config,
        optimizer=row.optimizer,
        implementation=row.implementation,
        options=row.options,
        bytes=row.bytes,
        state_tensors=row.state_tensors,
        phases=row.phases,
        peak_allocated_bytes=row.peak_allocated_bytes,
        peak_phase=row.peak_phase,
        peak_categories=row.peak_categories,
        peak_reserved_bytes=row.peak_reserved_bytes,
        device_bytes=row.device_bytes,
        environment=Environment(python="3.12", optplan="0.1.0", command="test", date="2026-11-22T00:00:00Z"),
    )
    return msgspec.structs.replace(record, **changes)


def test_a_measurement_that_is_as_predicted() -> None:
    row = judge(_measured(), name="same")
    assert (row.state_difference_bytes, row.parameters_difference_bytes) == (0, 0)
    assert (row.peak_error, row.reserved_error, row.device_error) == (0, 0, 0)
    assert set(row.phase_errors) == {"forward", "backward", "step"}
    assert set(row.phase_errors.values()) == {0}


def test_errors_are_of_the_measured_value() -> None:
    base = _measured()
    assert base.peak_allocated_bytes is not None
    row = judge(_measured(peak_allocated_bytes=base.peak_allocated_bytes * 2), name="twice")
    assert row.peak_error == pytest.approx(-0.5)
    state = msgspec.structs.replace(base.bytes, optimizer_state=base.bytes.optimizer_state + 512)
    assert judge(_measured(bytes=state), name="more").state_difference_bytes == -512


def test_only_phases_that_both_know_are_compared() -> None:
    row = judge(_measured(phases={"forward": PhasePeak(1000), "zero": PhasePeak(1)}), name="some")
    assert set(row.phase_errors) == {"forward"}


def test_a_step_that_ran_out_of_memory_is_judged_by_the_verdict() -> None:
    row = judge(_measured(out_of_memory=OutOfMemory("forward", 512, 2**30, "out of memory")), name="full")
    assert row.out_of_memory and row.verdict_right is False
    assert row.peak_error is None and row.phase_errors == {}


def test_the_report_over_several_records(tmp_path: Path) -> None:
    base = _measured()
    assert base.peak_allocated_bytes is not None
    save_record(base, tmp_path / "same.json.gz")
    save_record(_measured(peak_allocated_bytes=base.peak_allocated_bytes * 2), tmp_path / "twice.json.gz")
    unknown = msgspec.structs.replace(base.model, name="my.module:Net")
    save_record(_measured(model=unknown), tmp_path / "unknown.json.gz")
    report = validate_records(tmp_path.iterdir())
    assert (report.state_exact, report.state_known, report.is_exact) == (2, 2, True)
    peak = next(spread for spread in report.spreads if spread.metric == "peak_error")
    assert (peak.count, peak.worst_record) == (2, "twice")
    assert (peak.median, peak.worst) == (pytest.approx(0.25), pytest.approx(0.5))
    assert list(report.skipped) == ["unknown.json.gz"]
    assert report.skipped["unknown.json.gz"].startswith("unknown model 'my.module:Net'")


def test_times_are_compared_where_both_tell_them() -> None:
    time = StepTime(step_seconds=1.0, phases={}, num_steps=1)
    row = judge(_measured(time=time), name="timed")
    predicted = estimate("gpt2", gpu="h200-141g", optimizer="adamw", seq_len=128).estimates[0].step_seconds
    assert row.step_seconds_error == (None if predicted is None else pytest.approx(predicted["step"] - 1))


def test_files_that_are_no_measurements_keep_none_from_being_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = save_record(_measured(), "whole.json.gz").read_bytes()
    save_record(estimate("gpt2", gpu="h200-141g", optimizer="adamw"), "estimate.json.gz")
    Path("half.json.gz").write_bytes(whole[: len(whole) // 2])
    Path("newer.json").write_text('{"schema": "optplan.measurement/2"}')
    report = validate_records(["estimate.json.gz", "half.json.gz", "newer.json", "whole.json.gz"])
    assert [row.record for row in report.judgements] == ["whole"]
    assert report.skipped == {
        "estimate.json.gz": "'estimate.json.gz' is no measurement but optplan.estimate/1",
        "half.json.gz": "'half.json.gz' was cut short: its compressed content has no end",
        "newer.json": "'newer.json' was made by a newer optplan: schema 'optplan.measurement/2'; "
        "this version reads optplan.estimate/1, optplan.measurement/1",
    }


def test_the_trace_engine_is_judged_beside_the_rules(tmp_path: Path) -> None:
    base = _measured(peak_allocated_bytes=4 * 2**30, peak_reserved_bytes=8 * 2**30)
    for name in ("traced", "untraced"):
        save_record(base, tmp_path / f"{name}.json.gz")
    save_record(
        _measured(out_of_memory=OutOfMemory("forward", 512, 2**30, "out of memory")), tmp_path / "stopped.json.gz"
    )

    def trace(records: Mapping[str, Measurement]) -> dict[str, StepPeaks | str]:
        assert set(records) == {"traced.json.gz", "untraced.json.gz"}
        peaks = StepPeaks({"forward": PhasePeak(3 * 2**30)}, "forward", {}, 6 * 2**30)
        return {"traced.json.gz": peaks, "untraced.json.gz": "it cannot be traced"}

    report = validate_records(tmp_path.iterdir(), trace=trace)
    errors = {row.record: (row.trace_peak_error, row.trace_reserved_error) for row in report.judgements}
    assert errors == {"traced": (-0.25, -0.25), "untraced": (None, None), "stopped": (None, None)}
    assert report.skipped == {"untraced.json.gz, traced": "it cannot be traced"}
    assert {spread.metric: spread.count for spread in report.spreads if "trace" in spread.metric} == {
        "trace_peak_error": 1,
        "trace_reserved_error": 1,
    }
