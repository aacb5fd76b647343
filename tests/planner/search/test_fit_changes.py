"""Every change that a search in vain names, made: an estimate says that what is recommended then fits."""

import shlex

import pytest

from optplan.planner.estimate import estimate
from optplan.planner.search.recommend import recommend

MIXED = {"precision": "mixed", "checkpointing": "full", "batch_size": 1}
_NUMBERS = ("batch_size", "seq_len", "grad_accum", "gpus", "nodes")


def asked_by(command):
    """The model, the optimizers, their options and the flags of an `optplan` command."""
    words, flags = shlex.split(command)[2:], {}
    for flag, value in zip(words, [*words[1:], "--"], strict=True):
        if flag.startswith("--"):
            flags.setdefault(flag[2:].replace("-", "_"), []).append(True if value.startswith("--") else value)
    (model,), optimizers, options = flags.pop("model"), flags.pop("optimizer", None), flags.pop("set", None)
    step = {name: int(value) if name in _NUMBERS and value.isdigit() else value for name, (value,) in flags.items()}
    return model, {"optimizer": optimizers, "options": options, **step}


def says_that_it_fits(configuration):
    model, step = asked_by(configuration.command)
    return estimate(model, **step).estimates[0].fits


@pytest.mark.parametrize(
    ("model", "request_", "directions"),
    [
        ("llama-2-7b", {"gpu": "t4-16g", "optimizer": "adamw-8bit"}, ["gpu", "gpus"]),
        (
            "qwen3-8b",
            {"gpu": "rtx-4090-24g", "optimizer": "adamw", "gpus": 4, "sharding": "fsdp2", **MIXED},
            ["gpu", "gpus"],
        ),
        (
            "llama-3.1-70b",
            {"gpu": "a100-40g", "optimizer": "adamw-8bit", "precision": "bf16", "batch_size": 2},
            ["gpus"],
        ),
        (
            "gpt2-xl",
            {"gpu": "t4-16g", "optimizer": "adamw", "precision": "fp32", "checkpointing": "none", "batch_size": 4},
            ["gpu", "checkpointing"],
        ),
        (
            "llama-3.2-1b",
            {"gpu": "t4-16g", "optimizer": "adamw", "precision": "fp32", "checkpointing": "none", "seq_len": 8192},
            ["gpu", "seq_len"],
        ),
        (
            "llama-2-7b",
            {"gpu": "h100", "budget": "30GiB", "optimizer": "adamw", "precision": "bf16", "checkpointing": "full"},
            ["gpu", "gpus", "optimizer", "budget"],
        ),
    ],
)
def test_an_estimate_confirms_every_change_that_is_named(model, request_, directions):
    report = recommend(model, **request_)
    assert report.recommendation is None
    assert [change.direction for change in report.what_would_fit] == directions
    for change in report.what_would_fit:
        changed, question = asked_by(change.command)
        best = recommend(changed, **question).recommendation
        assert best is not None, change.text
        assert says_that_it_fits(best), change.text


@pytest.mark.parametrize(
    ("model", "request_"),
    [
        ("llama-3.1-8b", {"gpu": "rtx-4090-24g", "optimizer": "adamw", "gpus": "2..8", "sharding": "fsdp2"}),
        ("llama-2-7b", {"gpu": "a100-40g", "optimizer": "adamw", "precision": "mixed", "gpus": "2..4"}),
        (
            "qwen3-8b",
            {"gpu": "rtx-4090-24g", "optimizer": "adamw", "precision": "mixed", "gpus": 8, "sharding": "fsdp2"},
        ),
    ],
)
def test_an_estimate_confirms_what_is_recommended_on_several_gpus(model, request_):
    report = recommend(model, **request_)
    assert says_that_it_fits(report.recommendation)
    assert report.runner_up is None or says_that_it_fits(report.runner_up)


def test_on_several_gpus_the_communication_library_has_its_part_of_each():
    report = recommend(
        "llama-3.1-8b", gpu="rtx-4090-24g", gpus=8, sharding="fsdp2", optimizer="adamw", precision="bf16"
    )
    best = report.recommendation
    usable_bytes = estimate(
        "llama-3.1-8b", gpu="rtx-4090-24g", gpus=8, sharding="fsdp2", optimizer="sgd"
    ).gpu.usable_bytes
    # 847 MiB: NCCL's own memory, as measured on two H200s.
    assert report.gpu.usable_bytes - usable_bytes == 847 * 2**20
    assert best.peak_allocated_bytes + best.margin_bytes == usable_bytes
