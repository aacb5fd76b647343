"""Times of recorded steps in further processes: how they are read, and what they are together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optplan.planner.errors import ConfigError
from optplan.planner.measured.measurement import StepTime
from optplan.planner.measured.step_times import ProcessTime, pooled, read_process_times


def process(record: str = "step", **more: Any) -> ProcessTime:
    fields: dict[str, Any] = {
        "step_seconds": 0.1, "phases": {}, "num_steps": 5, "host_launch_seconds": (None,), "environment": {},
    }  # fmt: skip
    return ProcessTime(record=record, **{**fields, **more})


def line(**more: Any) -> str:
    fields: dict[str, Any] = {
        "schema": "optplan.step-times/1", "record": "step", "step_seconds": 0.1, "phases": {"forward": 0.04},
        "num_steps": 5, "host_launch_seconds": [2e-5, None], "environment": {"gpu": "NVIDIA H200"},
    }  # fmt: skip
    return json.dumps({**fields, **more}, ensure_ascii=False) + "\n"


def test_the_median_is_over_the_record_and_all_others() -> None:
    own = StepTime(step_seconds=0.5, phases={"forward": 0.2, "backward": 0.25}, num_steps=5, host_launch_seconds=1e-5)
    found = pooled(
        own,
        [
            # Measured before its steps and after them: 30 microseconds in the mean.
            process(step_seconds=0.3, phases={"forward": 0.1}, host_launch_seconds=(2e-5, 4e-5)),
            process(step_seconds=0.4, phases={"forward": 0.3, "step": 0.05}, host_launch_seconds=(None,)),
            process(step_seconds=0.9, phases={}, host_launch_seconds=(None, 5e-5)),
        ],
    )
    assert found is not None
    assert found.step_seconds == pytest.approx(0.45)
    assert found.all_seconds == (0.5, 0.3, 0.4, 0.9)
    assert found.phases == {"forward": 0.2, "backward": 0.25, "step": 0.05}
    # Of three hosts: 10, 30 and 50 microseconds; the one that nobody measured does not count.
    assert found.host_launch_seconds == pytest.approx(3e-5)


def test_where_no_host_was_measured_none_is_told() -> None:
    found = pooled(StepTime(step_seconds=0.5, phases={}, num_steps=1), [process(host_launch_seconds=())])
    assert found is not None and found.host_launch_seconds is None


@pytest.mark.parametrize("time", [None, StepTime(step_seconds=None, phases={}, num_steps=1)])
def test_a_record_without_a_time_has_none_with_others(time: StepTime | None) -> None:
    assert pooled(time, [process()]) is None


def test_lines_are_read_by_record(tmp_path: Path) -> None:
    assert read_process_times(tmp_path) == {}
    text = line() + line(record="other", step_seconds=2) + "\n" + line(step_seconds=0.2)
    (tmp_path / "step_times.jsonl").write_text(text)
    found = read_process_times(tmp_path)
    assert {name: [one.step_seconds for one in times] for name, times in found.items()} == {
        "step": [0.1, 0.2],
        "other": [2.0],
    }
    assert found["step"][0].host_launch_seconds == (2e-5, None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (line()[:-20], "Input data was truncated"),
        (line() + line(step_seconds=-0.1), "Expected `float` > 0.0 - at `$[1].step_seconds`"),
        (line(host_launch_seconds=[0]), "Expected `float` > 0.0 - at `$[0].host_launch_seconds[0]`"),
        (
            line(host_launch_seconds=[1e300, 1e308]),
            "Expected `float` <= 1000000000.0 - at `$[0].host_launch_seconds[0]`",
        ),
        (line(schema="optplan.step-times/2"), "Invalid enum value 'optplan.step-times/2' - at `$[0].schema`"),
        (line(record="\xff"), "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        (line(more="deep").replace('"deep"', "[" * 5000 + "]" * 5000), "its values are nested too deep"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str) -> None:
    monkeypatch.chdir(tmp_path)
    # Of one byte a character: text beyond ASCII is no UTF-8.
    Path("step_times.jsonl").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError) as refused:
        read_process_times(Path())
    assert str(refused.value) == f"'step_times.jsonl' cannot be read as times of steps: {reason}"
