"""The timing of optimizers, run on the CPU with a small model: how many rounds slow steps get, and what a row says."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from optplan.planner.models.reader import read_model

TINY = {"model_type": "gpt2", "vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, on the CPU, with the model above under every name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    module = importlib.import_module("bench_optimizers")

    def random_pairs(described: Any, dtype: torch.dtype) -> Any:
        return [(p, torch.nn.Parameter(torch.randn(p.shape).to(dtype))) for p in described]

    def renew_gradients(pairs: Any, *, seed: int) -> None:
        for _, tensor in pairs:
            tensor.grad = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)).to(tensor.dtype)

    def timed(step: Any) -> tuple[float, float]:
        step()
        return 2.0, 1.0

    spec = read_model(TINY, name="tiny", source="written for this test", where="tiny")
    monkeypatch.setattr(module, "load_model", lambda name: spec)
    monkeypatch.setattr(module, "random_pairs", random_pairs)
    monkeypatch.setattr(module, "renew_gradients", renew_gradients)
    monkeypatch.setattr(module, "run_timed", timed)
    return module


@pytest.mark.parametrize(("seconds", "num_steps", "num_rounds"), [(1000.0, 10 + 8, 8), (0.0, 1 + 3, 3)])
def test_slow_steps_get_one_warm_up_and_three_rounds(
    bench: Any, seconds: float, num_steps: int, num_rounds: int
) -> None:
    steps: list[str] = []
    times = bench.take_turns(
        lambda: steps.append("torch"), lambda: steps.append("ours"), limits=bench.Limits(8, seconds)
    )
    assert steps == ["torch", "ours"] * num_steps
    assert times == ([(2.0, 1.0)] * num_rounds, [(2.0, 1.0)] * num_rounds)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_paper_s_mode_of_adapprox_is_timed_beside_torch(
    bench: Any, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    contender = bench.CONTENDERS["adapprox-paper"]
    build = contender.build
    contender = contender._replace(build=lambda pairs, backend, lr: build(pairs, "torch", lr))
    monkeypatch.setitem(bench.CONTENDERS, "adapprox-paper", contender)
    assert bench.check(contender, getattr(torch, dtype)) == ""
    row = bench.measure("adapprox-paper", "tiny", dtype, limits=bench.Limits(15, 0.0), bandwidth=1e12)
    assert (row["options"], row["rounds"], row["ratio_to_torch"]) == ({"rank": 32, "mode": "paper"}, 3, 1.0)
    assert row["ours"] == {
        name: {"p20": s, "p50": s, "p80": s} for name, s in (("step_seconds", 2), ("host_seconds", 1))
    }
    assert row["num_parameters"] == 50 * 16 + 8 * 16 + 12 * 16**2 + 13 * 16 + 2 * 16
