"""Rules against trace: dense decoders, each with few layers, under half of the steps of `agreement_cases.toml`."""

import runpy
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "check_agreement.py"))


@pytest.mark.parametrize(
    "model",
    [
        "llama-2-7b", "llama-3.2-1b", "smollm2-135m", "mistral-7b-v0.1", "qwen2.5-0.5b", "qwen3-0.6b", "phi-3-mini",
        "gemma-2b", "gemma-2-2b", "gemma-3-1b", "olmo-2-1b",
    ],
)  # fmt: skip
def test_rules_and_trace_agree(model):
    assert SCRIPT["disagreements"](SCRIPT["check_cases"](model, half=True), mean=0.002, worst=0.01) == []
