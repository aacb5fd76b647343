"""The authors' Adam-mini, built for one process on a machine with several GPUs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from optplan.planner.catalog import load_model
from optplan.planner.optimizers.registry import build_optimizer as describe
from optplan.profilers.workloads.real_optimizers import build_optimizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 24,
    "num_attention_heads": 2, "num_hidden_layers": 1, "num_key_value_heads": 2, "vocab_size": 32,
}  # fmt: skip


def test_it_steps_alone_on_a_machine_of_several_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("adam_mini")
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = build_optimizer(
        describe("adam-mini", {"implementation": "official"}),
        model,
        list(model.parameters()),
        load_model(str(tmp_path / "config.json")),
    )
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
