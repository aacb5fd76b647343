"""The terminal report over records written by hand."""

from __future__ import annotations

import io
from typing import Any

import msgspec
import pytest
from rich.console import Console

from optplan.planner.records import (
    Estimate,
    EstimateReport,
    GpuRow,
    ModelRow,
    PhasePeak,
    Recommendation,
    ResidentBytes,
    Saving,
    Skipped,
    StepConfig,
)
from optplan.reports.terminal.estimate import render_estimate

GIB = 2**30
CONFIG = StepConfig("bf16", 2, 1024, 1, "none", "sdpa", 1, "none")


def row(name: str, *, state_gib: int, peak_gib: int, fits: bool = True, **more: Any) -> Estimate:
    peak = peak_gib * GIB
    return Estimate(
        optimizer=name,
        implementation="fused",
        options={},
        bytes=ResidentBytes(4 * GIB, 4 * GIB, 0, state_gib * GIB),
        state_tensors={"exp_avg": state_gib * GIB},
        phases={"forward": PhasePeak(peak - GIB), "backward": PhasePeak(peak), "step": PhasePeak(peak - 2 * GIB)},
        peak_allocated_bytes=peak,
        peak_phase="backward",
        peak_categories={
            "parameters": 4 * GIB,
            "optimizer_state": state_gib * GIB,
            "activations": peak - (4 + state_gib) * GIB,
        },
        peak_reserved_bytes=peak + GIB,
        device_bytes=peak + 2 * GIB,
        fits=fits,
        headroom_bytes=20 * GIB - peak,
        max_batch_size=3 if fits else 0,
        **more,
    )


def report(*rows: Estimate, **more: Any) -> EstimateReport:
    return EstimateReport(
        version="0.1.0",
        engine="rules",
        model=ModelRow("toy", 2 * GIB, "written by hand"),
        gpu=GpuRow("gpu-20g", 21 * GIB, 20 * GIB, GIB),
        estimates=list(rows),
        **{"config": CONFIG, "recommendation": None, **more},
    )


def render(record: EstimateReport, *, width: int = 130, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", newline="\n")
    render_estimate(record, Console(file=stream, width=width, highlight=False, markup=False, emoji=False))
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


TWO = report(
    row("adamw", state_gib=8, peak_gib=24, fits=False),
    row("adam-mini", state_gib=4, peak_gib=18, saving_against_adamw=Saving(4 * GIB, 6 * GIB)),
    recommendation=Recommendation("adam-mini", "optplan", {}, CONFIG, ["it has room"], "optplan estimate --model toy"),
    skipped=[Skipped("soap", "soap fails on bf16")],
    notes=["a remark"],
)


def test_says_what_fits_what_to_run_and_why() -> None:
    text = render(TWO)
    assert text.splitlines()[0] == "toy fits on gpu-20g with 1 of 2 optimizers"
    assert "20.00 GiB usable of 21.00 GiB, 1.00 GiB context" in " ".join(text.split())
    assert "Recommended: adam-mini" in text
    assert "it has room" in text
    assert "\noptplan estimate --model toy\n" in text
    assert "left out: soap fails on bf16" in text
    assert "a remark" in text


@pytest.mark.parametrize(
    ("several", "words"),
    [
        ({}, "micro-batch 2 × 1024 tokens · "),
        ({"gpus": 4, "sharding": "ddp"}, "micro-batch 2 × 1024 tokens per GPU · "),
        ({"gpus": 4, "tensor_parallel": 4}, "micro-batch 2 × 1024 tokens per copy of the model · "),
    ],
)
def test_the_setting_says_whose_micro_batch_it_is(several: dict[str, Any], words: str) -> None:
    record = report(row("adamw", state_gib=8, peak_gib=12), config=msgspec.structs.replace(CONFIG, **several))
    assert words in render(record, width=400)


def test_every_number_of_a_row() -> None:
    cells = next(line for line in render(TWO).splitlines() if line.startswith("adam-mini")).split()
    assert cells == [
        "adam-mini",
        "4.00",
        "12.00",
        "18.00",
        "backward",
        "19.00",
        "2.00",
        "3",
        "4.00",
        "->",
        "6.00",
        "150%",
    ]


@pytest.mark.parametrize("width", [40, 50, 58, 60, 70, 78, 80, 92, 100, 116, 126, 200])
def test_fits_the_width(width: int) -> None:
    lines = [line for line in render(TWO, width=width).splitlines() if not line.startswith("optplan estimate")]
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines)
    assert any(line.startswith("adamw") and "24.00" in line for line in lines)


def test_the_bar_crosses_the_limit_only_where_it_does_not_fit() -> None:
    bars = [line for line in render(TWO).splitlines() if "█" in line and "┃" in line and "usable" not in line]
    over, within = bars
    assert over.partition("┃")[2].strip("█▓▒░▚▞▤▥▧") == ""
    assert len(over.partition("┃")[2]) > 0
    assert within.partition("┃")[2].strip() == ""
    # 18 of 20 GiB: nine tenths of the way to the limit, to one column.
    inside = within.partition("┃")[0].removeprefix("adam-mini ")
    assert len(inside.rstrip()) == pytest.approx(0.9 * len(inside), abs=1)


def test_plain_signs_where_the_encoding_has_no_others() -> None:
    text = render(TWO, encoding="ascii")
    assert "optimizer state" in text
    assert "|" in text


def test_names_from_outside_are_not_markup() -> None:
    hostile = msgspec.structs.replace(TWO, model=ModelRow("[red]x[/red][/]\N{BELL}", 1, ""))
    assert "[red]x[/red][/]" in render(hostile)


def test_nothing_fits() -> None:
    text = render(report(row("adamw", state_gib=8, peak_gib=24, fits=False)))
    assert text.splitlines()[0] == "toy with adamw does not fit on gpu-20g, 4.00 GiB too much"
    expected = "Recommended: none of these has room, not even with full checkpointing; try a shorter --seq-len, other "
    assert expected + "optimizers or a larger GPU" in " ".join(text.split())


@pytest.mark.parametrize(
    ("checkpointing", "as_well"), [("none", ", and with full checkpointing too"), ("selective", ""), ("full", "")]
)
def test_what_fits_without_a_margin_is_not_said_to_have_no_room(checkpointing: str, as_well: str) -> None:
    config = msgspec.structs.replace(CONFIG, checkpointing=checkpointing)
    text = render(msgspec.structs.replace(report(row("adamw", state_gib=8, peak_gib=18)), config=config))
    assert text.splitlines()[0] == "toy with adamw fits on gpu-20g, 2.00 GiB to spare"
    assert (
        "Recommended: none of these with a margin: what fits reserves more than 98% of the usable memory"
        f"{as_well}; try a shorter --seq-len, other optimizers or a larger GPU"
    ) in " ".join(text.split())


def test_what_fits_by_bytes_alone_says_so() -> None:
    text = render(report(row("adamw", state_gib=8, peak_gib=19, fits=False)))
    expected = "toy with adamw does not fit on gpu-20g: 1.00 GiB to spare by bytes, lost to fragmentation"
    assert text.splitlines()[0] == expected


def test_a_peak_that_is_not_known_is_not_drawn() -> None:
    names = "phases peak_allocated_bytes peak_phase peak_categories peak_reserved_bytes device_bytes fits"
    unknown = dict.fromkeys(f"{names} headroom_bytes max_batch_size".split())
    text = render(report(msgspec.structs.replace(row("adamw", state_gib=8, peak_gib=24), **unknown)))
    assert text.splitlines()[0] == "toy on gpu-20g: the resident bytes fit; the peak is not modelled for this family"
    assert "Peak" not in text.replace("peak", "")
    assert "Recommended" not in text
