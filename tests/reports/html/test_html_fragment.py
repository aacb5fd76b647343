"""What a notebook shows for a record."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

import optplan
from optplan.planner.measured.comparison import compare
from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.record_files import load_record
from optplan.planner.measured.sides import sides_of
from optplan.planner.search.recommend import recommend
from optplan.reports.html.fragment import comparison_fragment, estimate_fragment, measurement_fragment, search_fragment

RECORD = Path(__file__).resolve().parents[3] / "docs" / "examples" / "h200_step.json.gz"
HOSTILE = "</script><img src=x onerror=alert(1)>"


def test_an_estimate_has_a_row_an_optimizer() -> None:
    report = optplan.estimate("llama-7b", gpu="a100-40g", optimizer=["adamw", "micro-adam"])
    text = estimate_fragment(report)
    assert "llama-1-7b fits on a100-40g" in text
    assert text.count('<th style="text-align:left;padding:.2em .8em .2em 0;font-weight:600">') == 2
    # 360 pixels stand for AdamW's peak of 50.24 GiB, so its 12.55 GiB of parameters for 90.
    assert re.search(r'title="parameters: 13,476,83\d,\d{3} bytes" style="[^"]*;width:90px;', text)
    assert "<script" not in text


def test_a_measurement_stands_beside_its_estimate() -> None:
    record = load_record(RECORD)
    assert isinstance(record, Measurement)
    text = measurement_fragment(record)
    assert "predicted by rules" in text
    assert "Peak 13.25 GiB allocated, in backward." in text


def test_a_search_has_a_row_a_configuration() -> None:
    report = recommend("gpt2", gpu="a100-40g", optimizer=["adamw", "lion"])
    text = search_fragment(report)
    assert "gpt2 on a100-40g: adamw" in text
    assert text.count('font-weight:600">') == min(12, len(report.front))
    assert "<script" not in text


def test_a_comparison_stands_beside_itself() -> None:
    text = comparison_fragment(compare(sides_of([str(RECORD), str(RECORD)])))
    assert "Resident, unrounded: parameters" in text
    # Parameters twice, resident and at the peak, gradients and both moments, each on two sides.
    assert text.count("2.30 GiB</td>") == 10


def test_a_hostile_name_is_text() -> None:
    report = optplan.estimate("gpt2", gpu="a100-40g", optimizer="adamw")
    named = msgspec.structs.replace(report, model=msgspec.structs.replace(report.model, name=HOSTILE))
    text = estimate_fragment(named)
    assert "<img" not in text
    assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt; with adamw fits on a100-40g" in text


def test_notebooks_are_told_how_to_show_records(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[tuple[str, str], Callable[[object], str]] = {}
    formatter = SimpleNamespace(
        for_type_by_name=lambda module, name, show: told.__setitem__((module, name), show),
    )
    shell = SimpleNamespace(display_formatter=SimpleNamespace(formatters={"text/html": formatter}))
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    report = optplan.estimate("gpt2", gpu="a100-40g", optimizer="adamw")
    assert set(told) == {
        ("optplan.planner.records", "EstimateReport"),
        ("optplan.planner.measured.measurement", "Measurement"),
        ("optplan.planner.measured.comparison", "Comparison"),
        ("optplan.planner.search.records", "SearchReport"),
    }
    assert told["optplan.planner.records", "EstimateReport"](report) == estimate_fragment(report)
