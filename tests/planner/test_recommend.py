"""What is recommended, and that the advice can be checked by running it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

import optplan
from optplan.planner.records import EstimateReport, Recommendation
from optplan.planner.search.recommend import recommend


def follow(advice: Recommendation) -> EstimateReport:
    """Run the recommended command line through the library."""
    words = shlex.split(advice.command)
    assert words[:2] == ["optplan", "estimate"]
    flags: dict[str, list[str]] = {}
    for flag, value in zip(words[2::2], words[3::2], strict=True):
        flags.setdefault(flag, []).append(value)
    numbers = {"batch_size", "seq_len", "grad_accum"}
    arguments: dict[str, object] = {"options": flags.pop("--set", None)}
    for flag, (value,) in flags.items():
        name = flag.removeprefix("--").replace("-", "_")
        arguments[name] = int(value) if name in numbers else value
    return optplan.estimate(arguments.pop("model"), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "target"),
    [
        ("llama-7b", {"gpu": "a100-40g"}),
        ("gpt2", {"gpu": "t4-16g", "precision": "fp16-amp"}),
        ("llama-3.1-8b", {"gpu": "h200", "precision": "mixed"}),
        ("tinyllama-1.1b", {"memory": "7GiB", "seq_len": 512}),
        ("gpt2-xl", {"gpu": "rtx-4090-24g", "batch_size": 2, "grad_accum": 4}),
    ],
)
def test_the_command_reproduces_a_step_that_fits_with_room(model: str, target: dict[str, object]) -> None:
    report = optplan.estimate(model, **target)  # type: ignore[arg-type]
    advice = report.recommendation
    assert advice is not None
    (row,) = follow(advice).estimates
    assert (row.optimizer, row.implementation, row.options) == (advice.optimizer, advice.implementation, advice.options)
    assert row.peak_reserved_bytes is not None
    assert row.peak_reserved_bytes <= 0.98 * report.gpu.usable_bytes
    assert report.estimates[0].optimizer == advice.optimizer


def test_adamw_stays_where_it_fits() -> None:
    advice = optplan.estimate("tinyllama-1.1b", gpu="h200").recommendation
    assert advice is not None
    assert (advice.optimizer, advice.config.checkpointing) == ("adamw", "none")


def test_llama_7b_trains_on_a_40_gb_card_as_the_micro_adam_paper_says() -> None:
    # arXiv:2405.15593: full fine-tuning of a 7B model on one 40 GB GPU; bf16, activation checkpointing.
    (row,) = optplan.estimate("llama-2-7b", gpu="a100-40g", optimizer="micro-adam", checkpointing="full").estimates
    assert row.fits
    (row,) = optplan.estimate("llama-2-7b", gpu="a100-40g", optimizer="adamw", checkpointing="full").estimates
    assert row.fits is False


def test_the_reasons_say_why_better_established_ones_lost() -> None:
    advice = optplan.estimate("llama-7b", gpu="a100-40g").recommendation
    assert advice is not None
    assert any(reason.startswith("adamw is better established but needs ") for reason in advice.reasons)


def test_only_what_was_asked_for_is_recommended() -> None:
    advice = optplan.estimate("tinyllama-1.1b", gpu="h200", optimizer=["sgd", "lion"]).recommendation
    assert advice is not None
    assert advice.optimizer == "lion"


def test_a_model_from_a_file_is_named_by_its_path(tmp_path: Path) -> None:
    folder = tmp_path / "my \x1b[31mmodel"
    folder.mkdir()
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
              "num_attention_heads": 4, "vocab_size": 100}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    report = optplan.estimate(str(folder), gpu="h200")
    assert report.model.name == "my ?[31mmodel"
    assert "\x1b" not in report.model.source
    assert report.recommendation is not None
    assert follow(report.recommendation).model == report.model


def test_what_no_rule_describes_is_not_recommended() -> None:
    # T5 has no rules for checkpointing: where nothing fits without it, nothing is recommended.
    assert optplan.estimate("t5-11b", gpu="l4-24g").recommendation is None


@pytest.mark.parametrize(
    ("model", "gpu", "optimizer"),
    [
        ("llama-7b", "a100-40g", "micro-adam"),
        ("tinyllama-1.1b", "h200-141g", "adamw"),
        ("llama-3.2-3b", "l40s-48g", "adamw"),
        ("llama-2-7b", "l40s-48g", "adam-mini"),
    ],
)
def test_the_search_takes_the_same_optimizer_for_the_same_step(model: str, gpu: str, optimizer: str) -> None:
    advice = optplan.estimate(model, gpu=gpu).recommendation
    assert advice is not None
    step = {"precision": "bf16", "batch_size": 1, "fused_loss": "none", "step_in_backward": False}
    # An option that is the default anyway takes every optimizer with its defaults alone, as estimate does.
    report = recommend(model, options={"window": 10}, gpu=gpu, tokens_per_step=advice.config.seq_len, **step)  # type: ignore[arg-type]
    found = report.recommendation
    assert found is not None
    assert (advice.optimizer, found.optimizer) == (optimizer, optimizer)
