"""The table of situations in `docs/recommend.md`: its lines for rows made by hand, and that the page has today's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30


@pytest.fixture
def section(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script."""
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    yield import_module("situations_section")
    sys.modules.pop("situations_section", None)


def row(place: str, predicted: float, measured: float, **changes: Any) -> dict[str, Any]:
    return {
        "situation": "a", "place": place, "configuration": "adamw, bf16, micro-batch 1",
        "question": {"model": "gpt2", "optimizer": ["adamw", "sgd"], "tokens_per_step": 2048, "budget": "8GiB"},
        "predicted_peak_bytes": 2 * GIB, "measured_peak_bytes": 2 * GIB + 2**27,
        "predicted_step_seconds": predicted, "measured_step_seconds": measured, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("second", "verdict"),
    [
        ((1.2, 1.5), "right: -17% predicted, -33% measured"),
        ((1.2, 0.8), "wrong: -17% predicted, +25% measured"),
        ((1.04, 0.8), "predicted alike, measured 25% apart"),
        (None, "runner-up not measured"),
    ],
)
def test_the_verdict(section: Any, second: tuple[float, float] | None, verdict: str) -> None:
    rows = [row("recommended", 1.0, 1.0), *([row("runner-up", *second)] if second else [])]
    lines = section.situations_table(rows)[2:]
    assert lines[0].endswith(f"| {verdict} |")
    assert len(lines) == len(rows)


def test_a_line_has_question_figures_and_where_it_is_from(section: Any) -> None:
    question = {"model": "gpt2", "optimizer": ["a", "b", "c", "d"], "tokens_per_step": 4096, "seq_len": 1024}
    rows = [
        row("recommended", 1.0, 1.25, record="x.json.gz"),
        row("recommended", 1.0, 1.0, situation="b", question=question),
    ]
    assert section.situations_table(rows)[2:] == [
        "| gpt2, any precision, 2,048 tokens, 8 GiB, adamw or sgd | recommended | adamw, bf16, micro-batch 1\\* "
        "| 2.00, 2.12 | 1.000, 1.250 (-20%) | runner-up not measured |",
        "| gpt2, any precision, 4,096 tokens in sequences of 1,024, the whole GPU | recommended "
        "| adamw, bf16, micro-batch 1 | 2.00, 2.12 | 1.000, 1.000 (+0%) | runner-up not measured |",
    ]


def test_the_newest_asking_with_both_configurations_counts(section: Any) -> None:
    both = [row("recommended", 1.0, 1.0), row("runner-up", 1.2, 1.5)]
    again = [row("recommended", 2.0, 2.0), row("runner-up", 2.4, 2.0)]
    alone = [row("recommended", 3.0, 3.0)]
    assert section.situations_table([*both, *again, *alone]) == section.situations_table(again)


def test_the_page_has_todays_table(section: Any) -> None:
    assert section.recommend_page() == section.PAGE.read_text(encoding="utf-8")
