"""The exported script runs as it is, with every optimizer and manner of step that it can express."""

from __future__ import annotations

import runpy
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from optplan.planner.records import StepConfig
from optplan.planner.trainers.export import export


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = import_module("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("tiny")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def script(model: Path, optimizer: str, implementation: str, options: dict[str, Any], **fields: Any) -> str:
    step: dict[str, Any] = {
        "precision": "fp32",
        "batch_size": 2,
        "seq_len": 8,
        "grad_accum": 1,
        "checkpointing": "none",
        "attention": "sdpa",
        "gpus": 1,
        "sharding": "none",
    }
    return export(
        "python",
        model=str(model),
        optimizer=optimizer,
        implementation=implementation,
        options=options,
        config=StepConfig(**step | fields),
    ).text


def run(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    path = folder / "train.py"
    path.write_text(text)
    monkeypatch.setattr(sys, "argv", ["train.py", "--steps", "2"])
    return runpy.run_path(str(path), run_name="__main__")


OPTIMIZERS: list[tuple[str, str, dict[str, Any]]] = [
    ("adamw", "fused", {}),
    ("adamw", "for-loop", {"amsgrad": True}),
    ("adamw", "optplan", {"rounding": "stochastic"}),
    ("micro-adam", "optplan", {"window": 4, "density": 0.02}),
    ("adam-mini", "optplan", {}),
    ("adam-mini", "official", {}),
    ("adapprox", "optplan", {}),
    ("adapprox", "optplan", {"rank": 8, "beta1": 0.0}),
    ("adapprox", "optplan", {"rank": 8, "mode": "paper"}),
    ("sgd", "foreach", {"momentum": 0.5, "weight_decay": 0.1}),
    ("adafactor", "torch", {}),
    ("adafactor", "transformers", {"beta1": 0.9}),
    ("lion", "pytorch_optimizer", {"foreach": False}),
    ("galore", "galore_torch", {"rank": 4}),
    ("apollo", "apollo_torch", {"rank": 4, "scale_type": "tensor", "target": "all-matrices"}),
    ("came", "came_pytorch", {}),
    ("sm3", "pytorch_optimizer", {"momentum": 0.5}),
    ("soap", "pytorch_optimizer", {"max_precond_dim": 100}),
]


@pytest.mark.parametrize(("optimizer", "implementation", "options"), OPTIMIZERS)
def test_every_optimizer_that_runs_on_a_cpu(
    optimizer: str,
    implementation: str,
    options: dict[str, Any],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # A network for weights is neither needed nor asked for.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run(script(tiny_model, optimizer, implementation, options), tmp_path, monkeypatch)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 1", "step 2"]
    assert all("nan" not in line for line in lines)


STEPS: list[dict[str, Any]] = [
    {"precision": "bf16", "grad_accum": 3, "clip_grad_norm": 1.0},
    {"precision": "amp", "checkpointing": "full", "padding_mask": True},
    {"precision": "mixed", "clip_grad_norm": 1.0},
    {"precision": "bf16", "checkpointing": "selective", "keep_grads": True},
    {"precision": "fp32", "checkpointing": "full-reentrant", "attention": "eager", "empty_cache": True},
    {"precision": "bf16", "step_in_backward": True},
    {"precision": "amp", "checkpointing": "selective", "fused_loss": "chunked"},
]


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_every_manner_of_step(
    step: dict[str, Any],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run(script(tiny_model, "adamw", "optplan", {}, **step), tmp_path, monkeypatch)
    assert "step 2: loss " in capsys.readouterr().out


def test_the_loss_in_chunks_is_the_models_own(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = import_module("torch")
    names = run(script(tiny_model, "adamw", "optplan", {}, fused_loss="chunked"), tmp_path, monkeypatch)
    model, tokens = names["load_model"](torch.device("cpu")), torch.arange(1, 23).view(2, 11)
    labels = tokens.masked_fill(tokens % 4 == 0, -100)
    own = import_module("transformers").LlamaForCausalLM.from_pretrained(tiny_model).train()
    expected = own(input_ids=tokens, labels=labels).loss.item()
    assert model(input_ids=tokens, labels=labels).loss.item() == pytest.approx(expected, rel=1e-6)


def test_options_reach_the_optimizer(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = script(tiny_model, "micro-adam", "optplan", {"window": 4, "density": 0.02})
    names = run(text, tmp_path, monkeypatch)
    optimizer = names["make_optimizer"](import_module("torch").nn.Linear(4, 4))
    group = optimizer.param_groups[0]
    assert (type(optimizer).__name__, group["window"], group["density"]) == ("MicroAdam", 4, 0.02)


@pytest.mark.parametrize(
    "sharding", ["ddp", "ddp-copies", "zero1", "fsdp2", "fsdp2-noreshard", "fsdp2-offload", "fsdp2-hybrid"]
)
@pytest.mark.parametrize("precision", ["bf16", "mixed", "fp16-amp"])
def test_scripts_for_several_gpus_are_python(sharding: str, precision: str, tiny_model: Path) -> None:
    step = {"sharding": sharding, "gpus": 4, "nodes": 2, "precision": precision, "fused_loss": "liger"}
    text = script(tiny_model, "adamw", "fused", {}, **step)
    code = compile(text, "train.py", "exec")
    assert ("fully_shard" in text) == sharding.startswith("fsdp2")
    assert ("reshard_after_forward=False" in text) == (sharding == "fsdp2-noreshard")
    assert ("ZeroRedundancyOptimizer" in text) == (sharding == "zero1")
    assert ("CPUOffloadPolicy()" in text) == (sharding == "fsdp2-offload")
    assert ('init_device_mesh("cuda", (2, 2)' in text) == (sharding == "fsdp2-hybrid")
    assert ("gradient_as_bucket_view=False" in text) == (sharding == "ddp-copies")
    assert "main" in code.co_names
