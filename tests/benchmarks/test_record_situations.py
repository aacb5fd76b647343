"""The run of recommended configurations: commands, errors and orders that are told right from wrong."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import msgspec
import pytest

from optplan.planner.measured.measurement import Environment, Measurement, StepTime
from optplan.planner.records import ModelRow, ResidentBytes
from optplan.planner.search.recommend import recommend
from optplan.planner.search.records import Configuration

ROOT = Path(__file__).parents[2]
SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks" / "record_situations.py"))


@pytest.fixture(scope="module")
def found() -> Configuration:
    """A configuration with its peak and time."""
    asked = {"optimizer": "adamw", "precision": "bf16", "checkpointing": "full", "batch_size": 1, "fused_loss": "none"}
    best = recommend("gpt2", gpu="h200", tokens_per_step=1024, step_in_backward=False, **asked).recommendation
    assert best is not None
    return best


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
