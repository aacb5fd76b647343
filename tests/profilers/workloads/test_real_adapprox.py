"""Adapprox as a live profile builds it from the planner's options."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from optplan.planner.catalog import load_model
from optplan.planner.optimizers.registry import build_optimizer as describe
from optplan.profilers.workloads.real_optimizers import build_optimizer


@pytest.mark.parametrize(
    ("options", "built"),
    [
        ({}, {"rank": "max", "mode": "fast", "betas": (0.9, 0.999)}),
        ({"rank": "min", "beta1": "0"}, {"rank": 1, "mode": "fast", "betas": (0.0, 0.999)}),
        ({"rank": "8", "mode": "paper"}, {"rank": 8, "mode": "paper", "betas": (0.9, 0.999)}),
    ],
)
def test_every_option_reaches_the_class(options: dict[str, str], built: dict[str, Any]) -> None:
    model = nn.Linear(4, 4)
    optimizer = build_optimizer(describe("adapprox", options), model, list(model.parameters()), load_model("gpt2"))
    assert {name: optimizer.defaults[name] for name in built} == built
