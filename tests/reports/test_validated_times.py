"""What a validation says of its times: over how many processes they are, and on which host they are predicted."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from optplan.planner.measured.validation import Judgement, Spread, ValidationReport
from optplan.reports.markdown.validation import validation_markdown
from optplan.reports.terminal.validation import render_validation
from optplan.reports.validated_times import how_timed

BY_MICROSECONDS = "microseconds to launch one operation."


def judgement(record: str = "step", **more: Any) -> Judgement:
    fields: dict[str, Any] = {
        "record": record, "model": "gpt2", "optimizer": "adamw", "implementation": "fused", "precision": "bf16",
        "batch_size": 1, "seq_len": 128, "checkpointing": "none", "attention": "sdpa", "gpu": "h200-141g",
        "state_difference_bytes": 0, "parameters_difference_bytes": 0, "peak_allocated_bytes": 2**30,
        "peak_error": 0.0, "reserved_error": 0.0, "device_error": 0.0, "phase_errors": {},
        "step_seconds_error": 0.05, "step_seconds": 0.1, "num_processes": 1, "host_launch_seconds": 1.694e-5,
    }  # fmt: skip
    return Judgement(**{**fields, **more})


def report_of(*rows: Judgement) -> ValidationReport:
    spreads = [Spread("step_seconds_error", 2, 0.05, 0.06, "a"), Spread("step_seconds_spread", 1, 0.08, 0.45, "a")]
    return ValidationReport(
        version="0.1.0", state_exact=len(rows), state_known=len(rows), spreads=spreads, judgements=list(rows)
    )


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (
            [judgement()],
            "Time of the whole step: measured in one process a step; predicted for their mean host, which took 16.9 "
            + BY_MICROSECONDS,
        ),
        (
            [judgement(num_processes=3), judgement(num_processes=1200, host_launch_seconds=2.26e-5)],
            "Time of the whole step: measured as the median over the processes that took it, 3 to 1200 a step and "
            "1,203 in all; predicted for their mean host, which took 16.9 to 22.6 " + BY_MICROSECONDS,
        ),
        (
            [judgement(num_processes=4), judgement(num_processes=4, host_launch_seconds=None)],
            "Time of the whole step: measured as the median over the processes that took it, 4 a step and 8 in all; "
            f"predicted for their mean host, which took 16.9 {BY_MICROSECONDS} In one step no process measured its "
            "host: there the host of a plain estimate is assumed.",
        ),
        (
            [judgement(host_launch_seconds=None), judgement(host_launch_seconds=None)],
            "Time of the whole step: measured in one process a step; predicted for the host of a plain estimate, "
            "because none measured its own.",
        ),
        # Nothing timed, and a validation saved before processes were counted.
        ([judgement(step_seconds_error=None, num_processes=0)], None),
        ([judgement(num_processes=0)], None),
    ],
)
def test_the_sentence(rows: list[Judgement], sentence: str | None) -> None:
    assert how_timed(rows) == sentence


def rendered(report: ValidationReport, width: int = 140) -> list[str]:
    stream = io.StringIO()
    render_validation(report, Console(file=stream, width=width, highlight=False, markup=False, emoji=False))
    return stream.getvalue().splitlines()


def test_the_terminal_says_over_how_many_processes() -> None:
    report = report_of(judgement("often", num_processes=9), judgement("once"))
    lines = rendered(report)
    words = [" ".join(line.split()) for line in lines]
    assert "time of the whole step 2 5.000% 6.000% a" in words
    assert "time of one process, from its step's median 1 8.000% 45.000% a" in words
    assert "over the processes that took it, 1 to 9 a step and 10 in all; predicted" in " ".join(lines)
    assert [line.split()[-2:] for line in lines if line.startswith("o")] == [["+5.000%", "9"], ["+5.000%", "1"]]


@pytest.mark.parametrize(("processes", "width", "told"), [(9, 140, True), (1, 140, False), (9, 80, False)])
def test_there_is_a_column_where_several_took_a_step_and_it_has_room(processes: int, width: int, told: bool) -> None:
    lines = rendered(report_of(judgement(num_processes=processes)), width)
    assert any(line.split()[-1:] == ["processes"] for line in lines) is told


def test_markdown_says_over_how_many_processes() -> None:
    rows = judgement("often", num_processes=9, trace_peak_error=0.01), judgement("full", out_of_memory=True)
    lines = validation_markdown(report_of(*rows)).splitlines()
    assert "| time of one process, from its step's median | 1 | 8.000% | 45.000% | a |" in lines
    assert how_timed(rows) in lines
    assert "| Record | State | Peak | Reserved | Step time | over processes | Peak by trace |" in lines
    assert "| often | exact | +0.000% | +0.000% | +5.000% | 9 | +1.000% |" in lines
    assert "| full | exact | out of memory | - | - | - | - |" in lines
    once = validation_markdown(report_of(judgement("once"))).splitlines()
    assert "| Record | State | Peak | Reserved | Step time |" in once
    assert "| once | exact | +0.000% | +0.000% | +5.000% |" in once
