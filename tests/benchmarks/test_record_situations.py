"""The run of recommended configurations: commands, errors and orders that are told right from wrong."""

from __future__ import annotations

import json
import runpy
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from optplan.planner.measured.measurement import Environment, Measurement, OutOfMemory, StepTime
from optplan.planner.measured.record_files import load_record
from optplan.planner.records import ModelRow, ResidentBytes
from optplan.planner.search.recommend import recommend
from optplan.planner.search.records import Configuration, SearchReport

ROOT = Path(__file__).parents[2]
SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks" / "record_situations.py"))
ROWS = [
    json.loads(line)
    for line in (ROOT / "benchmarks" / "records" / "h200_situations" / "situations.jsonl").read_text().splitlines()
]

SECONDS = ("predicted_step_seconds", "measured_step_seconds")


@pytest.fixture(scope="module")
def report() -> SearchReport:
    """An answer with one configuration."""
    asked = {"optimizer": "adamw", "precision": "bf16", "checkpointing": "full", "batch_size": 1, "fused_loss": "none"}
    return recommend("gpt2", gpu="h200", tokens_per_step=1024, step_in_backward=False, **asked)


@pytest.fixture(scope="module")
def found(report: SearchReport) -> Configuration:
    """A configuration with its peak and time."""
    assert report.recommendation is not None
    return report.recommendation


def run_of(found: Configuration, *, peak_bytes: int | None, seconds: float, device: str = "cuda") -> Any:
    """What was measured of a configuration whose prediction is one second and 1000 bytes."""
    assert found.time is not None
    time = msgspec.structs.replace(found.time, step_seconds=1.0)
    predicted = msgspec.structs.replace(found, peak_allocated_bytes=1000, time=time)
    measured = Measurement(
        version="0", source="live", device=device, model=ModelRow("gpt2", 1, ""), gpu=None, config=found.config,
        optimizer="adamw", implementation="fused", options={}, bytes=ResidentBytes(1, 1, 0, 1), state_tensors={},
        peak_allocated_bytes=peak_bytes, time=StepTime(step_seconds=seconds, phases={}, num_steps=3),
        environment=Environment(python="3.11", optplan="0", command="", date=""),
    )  # type: ignore[arg-type] # fmt: skip
    return SCRIPT["Run"]("recommended", predicted, measured)


def slower(run: Any, predicted_seconds: float) -> Any:
    """The same run with another prediction of its time."""
    time = msgspec.structs.replace(run.configuration.time, step_seconds=predicted_seconds)
    return run._replace(place="runner-up", configuration=msgspec.structs.replace(run.configuration, time=time))


def test_what_is_profiled_is_what_the_estimate_was_of(found: Configuration, tmp_path: Path) -> None:
    command = SCRIPT["profile_command"](found, device="cuda", steps=6, out=tmp_path / "a.json.gz")
    assert found.command.startswith("optplan estimate --model gpt2 --gpu h200-141g --optimizer adamw")
    assert command[:4] == ["optplan", "profile", "--model", "gpt2"]
    assert command[-6:] == ["--device", "cuda", "--steps", "6", "--out", str(tmp_path / "a.json.gz")]
    assert "--checkpointing" in command


@pytest.mark.parametrize(
    ("peak_bytes", "sentences"),
    [
        (1005, []),
        (1020, ["a, recommended: memory is -1.96 % off"]),
        (None, ["a, recommended: memory is not known"]),
    ],
)
def test_memory_within_one_percent(found: Configuration, peak_bytes: int | None, sentences: list[str]) -> None:
    assert SCRIPT["judge"]("a", [run_of(found, peak_bytes=peak_bytes, seconds=1.0)]) == sentences


@pytest.mark.parametrize(
    ("predicted", "measured", "is_right"),
    [
        (1.2, 1.3, True),
        (1.2, 0.9, False),
        # Within 5 % the search counts two as alike.
        (1.04, 0.9, True),
    ],
)
def test_the_order_of_speed(found: Configuration, predicted: float, measured: float, is_right: bool) -> None:
    first = run_of(found, peak_bytes=1000, seconds=1.0)
    second = slower(run_of(found, peak_bytes=1000, seconds=measured), predicted)
    sentences = SCRIPT["judge"]("a", [first, second])
    assert sentences == ([] if is_right else ["a: the quicker one by the prediction was slower"])


def test_a_row_has_both_sides_and_the_command(found: Configuration) -> None:
    row = SCRIPT["row_of"]("a", {"model": "gpt2"}, run_of(found, peak_bytes=1005, seconds=1.1))
    assert (row["predicted_peak_bytes"], row["measured_peak_bytes"]) == (1000, 1005)
    assert (row["predicted_step_seconds"], row["measured_step_seconds"]) == (1.0, 1.1)
    assert row["memory_error"] == pytest.approx(-0.004975, abs=1e-6)
    assert row["command"] == found.command


def test_nothing_is_claimed_of_the_cpu(found: Configuration) -> None:
    assert SCRIPT["judge"]("a", [run_of(found, peak_bytes=None, seconds=1.0, device="cpu")]) == []


def known_of(report: SearchReport, **changes: Any) -> Any:
    """A record of the answer's configuration on the GPU that was asked about, with changes."""
    found = report.recommendation
    assert found is not None
    fields = {
        "version": "0", "source": "live", "model": report.model, "gpu": None, "config": found.config,
        "optimizer": found.optimizer, "implementation": found.implementation, "options": found.options,
        "bytes": ResidentBytes(1, 1, 0, 1), "state_tensors": {}, "peak_allocated_bytes": 1000,
        "time": StepTime(step_seconds=1.0, phases={}, num_steps=3), "environment": ON_H200,
    }  # fmt: skip
    return SCRIPT["Known"](Path("a.json.gz"), Measurement(**(fields | changes)))


ON_H200 = Environment(
    python="3.12", optplan="0", date="2026-11-22T10:00:00Z", gpu="NVIDIA H200", gpu_total_bytes=150_110_011_392,
    command="__main__.py profile --model gpt2 --device cuda --steps 6 --out /tmp/a.json.gz --json",
)  # fmt: skip


def other_config(report: SearchReport, **changes: Any) -> Any:
    assert report.recommendation is not None
    return msgspec.structs.replace(report.recommendation.config, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        lambda _: {"model": ModelRow("gpt2-medium", 354823168, "")},
        lambda _: {"optimizer": "sgd"},
        lambda _: {"implementation": "foreach"},
        lambda _: {"options": {"amsgrad": True}},
        lambda _: {"state_dtype": "float32"},
        lambda report: {"config": other_config(report, precision="amp")},
        lambda report: {"config": other_config(report, batch_size=2)},
        lambda report: {"config": other_config(report, seq_len=512)},
        lambda report: {"config": other_config(report, grad_accum=2)},
        lambda report: {"config": other_config(report, checkpointing="none")},
        lambda report: {"config": other_config(report, gpus=2, sharding="ddp")},
    ],
)
def test_only_a_record_of_exactly_the_configuration_is_taken(report: SearchReport, changes: Any) -> None:
    same, other = known_of(report), known_of(report, **changes(report))
    assert SCRIPT["find_known"]([other, same], report, report.recommendation) is same
    assert SCRIPT["find_known"]([other], report, report.recommendation) is None


@pytest.mark.parametrize(
    ("changes", "is_whole"),
    [
        ({}, True),
        ({"source": "trace"}, False),
        ({"peak_allocated_bytes": None}, False),
        ({"time": None}, False),
        ({"out_of_memory": OutOfMemory("forward", 1, 1, "")}, False),
        ({"environment": msgspec.structs.replace(ON_H200, world_size=2)}, False),
        ({"environment": msgspec.structs.replace(ON_H200, gpu=None)}, False),
        ({"environment": msgspec.structs.replace(ON_H200, gpu="NVIDIA H100 80GB HBM3")}, False),
    ],
)
def test_only_whole_steps_on_the_asked_gpu_are_known(
    report: SearchReport, changes: dict[str, Any], is_whole: bool
) -> None:
    assert SCRIPT["is_whole"](known_of(report, **changes).record) is is_whole


def test_a_row_says_which_record_was_taken(report: SearchReport) -> None:
    path, record = known_of(report)
    row = SCRIPT["row_of"]("a", {"model": "gpt2"}, SCRIPT["Run"]("recommended", report.recommendation, record, path))
    assert (row["record"], row["date"]) == ("a.json.gz", "2026-11-22T10:00:00Z")
    assert row["record_command"] == "optplan profile --model gpt2 --device cuda --steps 6"


def test_what_was_recorded_holds() -> None:
    assert len(ROWS) >= 4
    assert all(abs(row["predicted_peak_bytes"] / row["measured_peak_bytes"] - 1) < 0.01 for row in ROWS)
    pairs = [pair for pair in pairwise(ROWS) if pair[1]["place"] == "runner-up"]
    assert len(pairs) >= 5
    for pair in pairs:
        assert pair[0]["situation"] == pair[1]["situation"]
        predicted, measured = (pair[0][key] / pair[1][key] for key in SECONDS)
        # Beyond 5 % of each other the predicted times must be in the measured order.
        assert 1 / 1.05 <= predicted <= 1.05 or (predicted < 1) == (measured < 1), pair[0]["situation"]


@pytest.mark.parametrize("row", [row for row in ROWS if row.get("record")], ids=lambda row: row["situation"])
def test_a_row_has_the_figures_of_the_record_it_names(row: dict[str, Any]) -> None:
    record = load_record(ROOT / row["record"])
    assert isinstance(record, Measurement)
    assert record.time is not None
    assert record.model.name == row["question"]["model"]
    assert (row["measured_peak_bytes"], row["measured_step_seconds"]) == (
        record.peak_allocated_bytes,
        record.time.step_seconds,
    )
    assert (row["date"], row["commit"]) == (record.environment.date, record.environment.commit)
