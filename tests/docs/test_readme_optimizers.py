"""The README's snippets of optimizers run as they stand, on models of a few parameters."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## The optimizers themselves\n")[2]
SNIPPETS = re.findall(r"```python\n(.*?)```", SECTION.partition("\n## ")[0], re.DOTALL)


def snippet(word: str) -> str:
    """The one snippet with a word in it."""
    (found,) = [code for code in SNIPPETS if word in code]
    return found


def run(code: str, **names: Any) -> dict[str, Any]:
    exec(compile(code, "README.md", "exec"), names)
    return names


def tiny_llama() -> Any:
    transformers = import_module("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **sizes)
    )


def test_the_plain_loop_learns() -> None:
    model, text = tiny_llama(), torch.arange(16).view(2, 8)
    losses: list[float] = []

    def loss_of(model: Any, batch: torch.Tensor) -> torch.Tensor:
        loss = model(input_ids=batch, labels=batch).loss
        losses.append(loss.item())
        return loss

    names = run(snippet("loss_of"), model=model, batches=[text] * 5, loss_of=loss_of)
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 5
    kinds = {row.name: row.kind for row in names["optimizer"].partition_table()}
    assert kinds["model.layers.0.self_attn.q_proj.weight"] == "head"
    assert kinds["model.layers.0.mlp.up_proj.weight"] == "row"


@pytest.mark.parametrize("given", ["built", "to_build"])
def test_the_trainer_trains(given: str, tmp_path: Path) -> None:
    transformers = import_module("transformers")
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, weight_decay=0.1,
    )  # fmt: skip
    dataset = [{"input_ids": list(range(i, i + 8)), "labels": list(range(i, i + 8))} for i in range(4)]
    trainers: list[Any] = []

    def make(*args: Any, **options: Any) -> Any:
        trainers.append(transformers.Trainer(*args, **options))
        return trainers[-1]

    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    code = snippet("Trainer(").replace("**built", f"**{given}")
    run(code, model=model, arguments=arguments, dataset=dataset, Trainer=make)
    optimizer = trainers[0].optimizer.optimizer
    assert type(optimizer).__name__ == {"built": "AdamMini", "to_build": "MicroAdam"}[given]
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if given == "to_build":
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}


SHARDED = """
import os, sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x
model = Model()
{snippet}
before = [p.full_tensor().clone() for p in model.parameters()]
model(torch.ones(3, 8)).sum().backward()
optimizer.step()
assert all(isinstance(p, DTensor) for p in model.parameters())
print(all(not torch.equal(old, p.full_tensor()) for old, p in zip(before, model.parameters())))
dist.destroy_process_group()
"""


def test_sharded_parameters_step(tmp_path: Path) -> None:
    code = SHARDED.replace("{snippet}", snippet("fully_shard"))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code, str(tmp_path / "store")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100, env=environment)
    assert (result.stdout, result.returncode) == ("True\n", 0), result.stderr
