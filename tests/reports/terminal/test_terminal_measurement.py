"""A measured step in the terminal: the verdict, what every rank did, what cannot be compared."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from optplan.planner.measured.measurement import Environment, Measurement, OutOfMemory, RankRow
from optplan.planner.records import ModelRow, ResidentBytes, StepConfig
from optplan.reports.terminal.measurement import render_measurement

GIB = 2**30
BYTES = ResidentBytes(GIB, GIB, 0, 2 * GIB)


def record(**more: Any) -> Measurement:
    fields: dict[str, Any] = {
        "version": "0.1.0",
        "source": "live",
        "model": ModelRow("my.module:Net", 2**29, "my.module"),
        "gpu": None,
        "config": StepConfig("bf16", 2, 1024, 1, "none", "sdpa", 1, "none"),
        "optimizer": "adamw",
        "implementation": "fused",
        "options": {},
        "bytes": BYTES,
        "state_tensors": {"exp_avg": GIB, "exp_avg_sq": GIB},
        "environment": Environment(python="3.12", optplan="0.1.0", command="optplan profile", date="2026-11-22"),
    }
    return Measurement(**{**fields, **more})


def render(measurement: Measurement, *, width: int = 120) -> str:
    stream = io.StringIO()
    render_measurement(measurement, Console(file=stream, width=width, highlight=False, markup=False, emoji=False))
    return stream.getvalue()


def test_the_peak_comes_first() -> None:
    text = render(record(peak_allocated_bytes=5 * GIB, peak_phase="backward"))
    assert text.startswith("my.module:Net with adamw (fused): peak 5.00 GiB allocated, in backward\n")


def test_running_out_of_memory_is_told_with_what_was_asked_for() -> None:
    failure = OutOfMemory("forward", 512 * 2**20, 7 * GIB, "CUDA out of memory. Tried to allocate 512.00 MiB")
    text = render(record(out_of_memory=failure))
    assert "ran out of memory in forward, asking for 512.00 MiB, with 7.00 GiB allocated" in text
    assert "CUDA out of memory. Tried to allocate 512.00 MiB" in text


def test_what_cannot_be_estimated_is_said() -> None:
    assert "no estimate to hold it against: a step measured on the CPU has no GPU" in render(record())


def test_every_rank_has_a_row() -> None:
    ranks = [
        RankRow(rank=0, bytes=BYTES, state_tensors={}, peak_allocated_bytes=5 * GIB, step_seconds=0.25),
        RankRow(rank=1, bytes=BYTES, state_tensors={}, out_of_memory=OutOfMemory("step", None, GIB, "full")),
    ]
    lines = [line.split() for line in render(record(ranks=ranks)).splitlines()]
    assert ["0", "2.00", "GiB", "5.00", "GiB", "-", "250.00", "ms"] in lines
    assert ["1", "2.00", "GiB", "out", "of", "memory", "-", "-"] in lines


@pytest.mark.parametrize("width", [60, 120, 200])
def test_a_hostile_name_cannot_steer_the_terminal(width: int) -> None:
    text = render(record(model=ModelRow("\x1b[2J</script>", 1, "x")), width=width)
    assert "\x1b" not in text
    assert all(len(line) <= width for line in text.splitlines())
