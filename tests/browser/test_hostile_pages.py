"""What others have named stands on the pages as text: in models, records, paths, GPUs and notes."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import optplan
from optplan.planner.accuracy import AccuracyReport, AccuracyRow
from optplan.planner.estimate_details import details_of
from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.record_files import load_record
from optplan.planner.rivals import RivalAnswer, RivalCase, Rivals, RivalTool
from optplan.planner.search.recommend import recommend
from optplan.reports.html.accuracy_page import accuracy_page
from optplan.reports.html.comparison_page import measurement_page
from optplan.reports.html.documents import load_runs
from optplan.reports.html.estimate_page import estimate_page
from optplan.reports.html.recommendation_page import recommendation_page
from optplan.reports.html.training_page import training_page

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "</script><img src=x onerror=alert(1)>"

Open = Callable[..., Any]


def replaced(record: Any, **changes: Any) -> Any:
    return msgspec.structs.replace(record, **changes)


def estimate() -> str:
    report = optplan.estimate("gpt2", gpu="rtx-4090-24g", optimizer=["adamw", "lion"])
    rows = [replaced(row, notes=[HOSTILE]) for row in report.estimates]
    named = replaced(
        report, model=replaced(report.model, name=HOSTILE, source=HOSTILE), gpu=replaced(report.gpu, name=HOSTILE),
        estimates=rows, notes=[HOSTILE],
    )  # fmt: skip
    return estimate_page(named, details_of(report))


def search() -> str:
    report = recommend("gpt2", gpu="a100-40g", optimizer=["adamw", "lion"])
    return recommendation_page(
        replaced(
            report, model=replaced(report.model, name=HOSTILE), notes=[HOSTILE], reasons=[HOSTILE], advice=[HOSTILE]
        )
    )


def measurement() -> str:
    record = load_record(ROOT / "docs" / "examples" / "h200_step.json.gz")
    assert isinstance(record, Measurement)
    assert record.history is not None
    return measurement_page(
        replaced(
            record,
            model=replaced(record.model, name=HOSTILE),
            environment=replaced(record.environment, driver=HOSTILE, gpu=HOSTILE),
            history=replaced(record.history, names=[HOSTILE, *record.history.names[1:]]),
        )
    )


def accuracy() -> str:
    row = AccuracyRow(
        model=HOSTILE, precision="bf16", optimizer=HOSTILE, implementation="fused", batch_size=4, seq_len=1024,
        grad_accum=1, checkpointing="none", attention="sdpa", more=HOSTILE, measured_peak_bytes=10**9,
        predicted_peak_bytes=10**9, measured_reserved_bytes=2 * 10**9, predicted_reserved_bytes=2 * 10**9,
        measured_phases={"forward": 10**9}, predicted_phases={"forward": 10**9}, state_is_exact=True, record=HOSTILE,
    )  # fmt: skip
    case = RivalCase(
        model=HOSTILE, precision="bf16", optimizer="adamw", implementation="fused", batch_size=1, seq_len=8,
        checkpointing="none", attention="sdpa", measured_peak_bytes=100,
    )  # fmt: skip
    answers = [RivalAnswer(case=0, predicted_bytes=90, call=HOSTILE, note=HOSTILE)]
    tools = [
        RivalTool(title=name, package="p", version=HOSTILE, source=HOSTILE, counts=HOSTILE, answers=answers)
        for name in (HOSTILE, "another")
    ]
    rivals = Rivals(
        date=datetime.date(2026, 11, 22), environment=HOSTILE, record=HOSTILE, place=HOSTILE, cases=[case], tools=tools,
    )  # fmt: skip
    return accuracy_page(AccuracyReport(version=HOSTILE, place=HOSTILE, rows=[row], rivals=rivals))


def training() -> str:
    runs = load_runs(str(ROOT / "benchmarks" / "records" / "h200_training.jsonl"))
    named = [replaced(run, optimizer=HOSTILE if run.optimizer == "adamw" else run.optimizer) for run in runs]
    return training_page(named, source=HOSTILE)


@pytest.mark.parametrize("make", [estimate, search, measurement, accuracy, training])
def test_a_hostile_name_is_text(make: Callable[[], str], visit: Open, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(make(), encoding="utf-8")
    seen = visit(path)
    seen.draw_all()
    assert seen.complaints == []
    assert seen.requests == [path.as_uri()]
    assert seen.page.locator("img").count() == 0
    assert seen.page.evaluate("document.body.innerText").count(HOSTILE) > 0
    # In figures plotly takes strings for markup: there the name is escaped, and shows as it is.
    figures = seen.page.evaluate("JSON.parse(document.getElementById('optplan-figures').textContent)")
    assert "<img" not in json.dumps(figures)


def test_a_hostile_path_is_text(visit: Open, tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    folder.mkdir()
    config = {"model_type": "gpt2", "vocab_size": 1000, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64}
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": HOSTILE}), encoding="utf-8")
    html = tmp_path / "page.html"
    command = [
        "estimate", "--model", str(folder / "config.json"), "--memory", "1GiB", "--optimizer", "adamw",
        "--html", str(html),
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "optplan", *command], capture_output=True, check=True)
    seen = visit(html)
    seen.draw_all()
    assert seen.complaints == []
    assert seen.page.locator("img").count() == 0
    assert "<img src=x onerror=alert(1)>" in (seen.page.text_content("#command") or "")
    assert "<img src=x onerror=alert(1)>" in (seen.page.text_content("#export-python") or "")
