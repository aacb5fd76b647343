"""The timeline in the terminal, over a record written by hand."""

import io

import msgspec
import pytest
from rich.console import Console

from optplan.planner.records import GpuRow, ModelRow, StepConfig
from optplan.planner.replay import LiveTensor
from optplan.planner.step_history import PhaseSpan
from optplan.planner.timeline_report import CurvePoint, PeakChange, TimelineReport
from optplan.reports.terminal.timeline import render_timeline

GIB = 2**30


def report(*, usable_bytes: int = 8 * GIB, fits: bool = True, name: str = "toy") -> TimelineReport:
    return TimelineReport(
        version="0.1.0",
        engine="rules",
        model=ModelRow(name, 2 * GIB, "written by hand"),
        gpu=GpuRow("gpu-9g", 9 * GIB, usable_bytes, GIB),
        config=StepConfig("bf16", 2, 1024, 1, "none", "sdpa", 1, "none"),
        optimizer="adamw",
        implementation="fused",
        options={},
        num_events=4,
        phases=[PhaseSpan("forward", 1, 2, 6 * GIB), PhaseSpan("backward", 3, 4, 5 * GIB)],
        peak_allocated_bytes=6 * GIB,
        peak_phase="forward",
        peak_event=2,
        peak_reserved_bytes=7 * GIB,
        peak_categories={"parameters": 3 * GIB, "activations": 3 * GIB},
        alive=[LiveTensor("layers.0 output", "activations", 3 * GIB), LiveTensor("weight", "parameters", 2 * GIB)],
        alive_count=3,
        curve=[
            CurvePoint(0, "forward", "", 3 * GIB, {"parameters": 3 * GIB}),
            CurvePoint(2, "forward", "layers.0 output", 6 * GIB, {"parameters": 3 * GIB, "activations": 3 * GIB}),
            CurvePoint(3, "backward", "x", 5 * GIB, {"parameters": 3 * GIB, "gradients": 2 * GIB}),
            CurvePoint(4, "backward", "layers.0 output", 3 * GIB, {"parameters": 3 * GIB}),
        ],
        changes=[PeakChange("--checkpointing full", "activations", "computes again", 5 * GIB, GIB)],
        fits=fits,
        headroom_bytes=usable_bytes - 6 * GIB,
    )


def render(record: TimelineReport, *, width: int = 120, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", newline="\n")
    render_timeline(record, Console(file=stream, width=width, highlight=False, markup=False, emoji=False))
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)


def headline(record: TimelineReport) -> str:
    return render(record, width=200).splitlines()[0]


def test_the_verdict_comes_first() -> None:
    assert headline(report()) == (
        "toy with adamw (fused) fits on gpu-9g, 2.00 GiB to spare: peak 6.00 GiB allocated, in forward"
    )
    assert headline(report(usable_bytes=5 * GIB, fits=False)) == (
        "toy with adamw (fused) does not fit on gpu-9g, 1.00 GiB too much: peak 6.00 GiB allocated, in forward"
    )


def test_the_verdict_names_fragmentation_where_it_refuses_the_step() -> None:
    assert headline(report(fits=False)) == (
        "toy with adamw (fused) does not fit on gpu-9g: 2.00 GiB to spare by bytes, lost to fragmentation; peak 6.00 "
        "GiB allocated, in forward"
    )


def test_a_record_without_headroom_has_the_verdict_alone() -> None:
    assert headline(msgspec.structs.replace(report(fits=False), headroom_bytes=None)) == (
        "toy with adamw (fused) does not fit on gpu-9g: peak 6.00 GiB allocated, in forward"
    )


def test_several_gpus_are_counted() -> None:
    config = msgspec.structs.replace(report().config, gpus=16, nodes=2, sharding="fsdp2")
    setting = render(msgspec.structs.replace(report(), config=config), width=200).splitlines()[1]
    assert setting.startswith(
        "16 GPUs on 2 nodes, fsdp2; memory is that of each GPU · bf16 · micro-batch 2 × 1024 tokens per GPU · "
    )
    assert "GPU" not in render(report(), width=200).splitlines()[1]


def test_the_chart_is_as_high_as_what_is_allocated() -> None:
    # Four moments in 100 columns, 25 each; the top row stands for the 8 GiB that are usable.
    text = render(report(), width=108, encoding="ascii")
    rows = {line[:6].strip(): line[7:] for line in text.splitlines() if line[:7].strip().replace(".", "").isdigit()}
    assert rows["8.0"] == "-" * 100
    assert rows["5.7"] == " " * 25 + "~" * 25 + " " * 50
    assert rows["4.6"] == " " * 25 + "~" * 25 + "=" * 25 + " " * 25
    assert rows["2.9"] == "#" * 100


def test_the_peak_is_marked_and_the_phases_named() -> None:
    lines = render(report(), width=108, encoding="ascii").splitlines()
    marker = next(line for line in lines if "peak, event 2" in line)
    names = lines[lines.index(marker) + 1]
    assert marker.index("^") == 7 + 25
    assert names.index("|forward") == 7
    assert names.index("|backward") == 7 + 50


def test_tensors_and_changes_are_listed() -> None:
    text = render(report())
    assert "Largest of 3 tensors alive at the peak" in text
    assert any(line.split() == ["3.00", "GiB", "activations", "layers.0", "output"] for line in text.splitlines())
    assert "and 1 smaller ones, 1.00 GiB" in text
    row = next(line.split() for line in text.splitlines() if "--checkpointing" in line)
    assert row == ["1.00", "5.00", "--checkpointing", "full", "computes", "again"]


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_line_is_wider_than_the_terminal(width: int, encoding: str) -> None:
    assert all(len(line) <= width for line in render(report(), width=width, encoding=encoding).splitlines())


def test_a_hostile_name_cannot_steer_the_terminal() -> None:
    assert "\x1b" not in render(report(name="\x1b[2J"))
