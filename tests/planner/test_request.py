from __future__ import annotations

from typing import Any

import pytest

from optplan.planner.catalog import load_model
from optplan.planner.errors import ConfigError
from optplan.planner.request import check_request


def test_defaults_follow_the_model() -> None:
    request = check_request(load_model("llama-3.1-8b"), gpu="h100-80g")
    assert (request.config.batch_size, request.config.seq_len, request.config.precision) == (1, 2048, "bf16")
    assert check_request(load_model("gpt2"), gpu="h100-80g").config.seq_len == 1024


@pytest.mark.parametrize(
    ("precision", "parameter", "gradient", "master", "updated"),
    [
        ("bf16", "bfloat16", "bfloat16", None, "bfloat16"),
        ("fp32", "float32", "float32", None, "float32"),
        ("amp", "float32", "float32", None, "float32"),
        ("fp16-amp", "float32", "float32", None, "float32"),
        ("mixed", "bfloat16", "bfloat16", "float32", "float32"),
    ],
)
def test_precision_policies(precision: str, parameter: str, gradient: str, master: str | None, updated: str) -> None:
    policy = check_request(load_model("gpt2"), gpu="h200", precision=precision).policy
    assert (policy.parameter_dtype, policy.gradient_dtype, policy.master_dtype) == (parameter, gradient, master)
    assert policy.updated_dtype == updated


def test_a_longer_sequence_than_trained_for_is_remarked() -> None:
    request = check_request(load_model("llama-2-7b"), gpu="h200", seq_len=8192)
    assert request.notes == ("sequence length 8192 is beyond the 4096 tokens that llama-2-7b was trained for",)


@pytest.mark.parametrize(("model", "longest"), [("gpt2", 1024), ("opt-1.3b", 2048), ("bert-base", 512)])
def test_learned_positions_end_where_the_table_ends(model: str, longest: int) -> None:
    check_request(load_model(model), gpu="h200", seq_len=longest)
    with pytest.raises(ConfigError) as caught:
        check_request(load_model(model), gpu="h200", seq_len=longest + 1)
    assert str(caught.value) == (
        f"--seq-len {longest + 1} is beyond the {longest} positions that {load_model(model).name} has embeddings for"
    )


@pytest.mark.parametrize("model", ["t5-base", "bloom-560m", "pythia-160m"])
def test_relative_positions_have_no_end(model: str) -> None:
    check_request(load_model(model), gpu="h200", seq_len=3 * load_model(model).max_seq_len)


def test_a_gpu_without_bf16_is_remarked() -> None:
    assert check_request(load_model("gpt2"), gpu="t4-16g").notes == (
        "t4-16g has no bf16 arithmetic: torch emulates it slowly; --precision fp16-amp or fp32 runs natively",
    )
    assert check_request(load_model("gpt2"), gpu="t4-16g", precision="fp16-amp").notes == ()


def test_attention_is_what_transformers_takes() -> None:
    assert check_request(load_model("llama-2-7b"), gpu="h200").config.attention == "sdpa"
    request = check_request(load_model("gemma-2-2b"), gpu="h200")
    assert request.config.attention == "eager"
    assert request.notes == (
        "gemma-2-2b caps its attention scores, which sdpa cannot: eager attention is taken, as transformers does",
    )


def test_a_budget_is_all_usable() -> None:
    gpu = check_request(load_model("gpt2"), memory="38GiB").gpu
    assert (gpu.total_bytes, gpu.usable_bytes, gpu.context_bytes) == (40_802_189_312, 40_802_189_312, 0)


@pytest.mark.parametrize("value", [True, 1.0, "1", None, 2**21])
def test_counts_are_integers_in_range(value: object) -> None:
    with pytest.raises(ConfigError, match="--batch-size must be an integer between 1 and 1048576"):
        check_request(load_model("gpt2"), gpu="h200", batch_size=value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            {"step_in_backward": True, "clip_grad_norm": 1.0},
            "--step-in-backward and --clip-grad-norm contradict each other: "
            "the norm of all gradients needs all of them",
        ),
        (
            {"step_in_backward": True, "grad_accum": 4},
            "--step-in-backward and --grad-accum 4 contradict each other: "
            "gradients that are used up cannot be added to",
        ),
        (
            {"step_in_backward": True, "keep_grads": True},
            "--step-in-backward and --keep-grads contradict each other: gradients that are used up are not kept",
        ),
        ({"clip_grad_norm": 0.0}, "--clip-grad-norm must be above 0, got 0.0"),
        ({"clip_grad_norm": float("nan")}, "--clip-grad-norm must be above 0, got nan"),
        (
            {"attention": "flash", "padding_mask": True},
            "--attention flash and --padding-mask contradict each other: flash attention takes the padding out of the "
            "batch, which is not modelled; use --attention sdpa",
        ),
        ({"fused_loss": "chunk"}, "unknown fused-loss for --fused-loss 'chunk'; nearest: chunked"),
        ({"fused_loss": "ligr"}, "unknown fused-loss for --fused-loss 'ligr'; nearest: liger"),
        (
            {"checkpointing": "reentrant"},
            "unknown checkpointing for --checkpointing 'reentrant'; nearest: full-reentrant",
        ),
    ],
)
def test_options_that_contradict_each_other(flags: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_request(load_model("llama-2-7b"), gpu="h200", **flags)
    assert str(caught.value) == sentence
