"""transformers' Trainer builds from the exported arguments the optimizer that the estimate is of."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from optplan.planner.records import StepConfig
from optplan.planner.trainers.export import export


@pytest.fixture(scope="module")
def model() -> Any:
    transformers = import_module("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes))


def trainer(model: Any, folder: Path, optimizer: str, implementation: str, options: dict[str, Any]) -> Any:
    transformers = import_module("transformers")
    config = StepConfig(
        precision="fp32",
        batch_size=2,
        seq_len=8,
        grad_accum=1,
        checkpointing="none",
        attention="sdpa",
        gpus=1,
        sharding="none",
    )
    written = export(
        "hf-args", model="gpt2", optimizer=optimizer, implementation=implementation, options=options, config=config
    )
    path = folder / "training_args.yaml"
    path.write_text(f"{written.text}use_cpu: true\n")
    (arguments,) = transformers.HfArgumentParser(transformers.TrainingArguments).parse_yaml_file(str(path))
    hooks: dict[str, Any] = {}
    for sentence in written.by_hand:
        if sentence.startswith("build the optimizer in the script: "):
            # The sentence is Python; run as it stands, with the Trainer's arguments caught.
            names = {"Trainer": lambda _, **given: hooks.update(given), "model": model}
            exec(sentence.removeprefix("build the optimizer in the script: "), names)
    return transformers.Trainer(model=model, args=arguments, **hooks)


@pytest.mark.parametrize(
    ("optimizer", "implementation", "options", "name", "group"),
    [
        ("adamw", "fused", {}, "AdamW", {"fused": True}),
        ("adamw", "foreach", {}, "AdamW", {"fused": None, "foreach": None}),
        ("adamw", "for-loop", {}, "AdamW", {"foreach": False}),
        ("adamw", "fused", {"amsgrad": True}, "AdamW", {"fused": True, "amsgrad": True}),
        ("sgd", "foreach", {"momentum": 0.5, "nesterov": True}, "SGD", {"momentum": 0.5, "nesterov": True}),
        ("adafactor", "transformers", {}, "Adafactor", {"scale_parameter": False, "relative_step": False}),
        ("micro-adam", "optplan", {"window": 4}, "MicroAdam", {"window": 4, "density": 0.01}),
        ("adam-mini", "optplan", {}, "AdamMini", {"lr": 1e-5}),
        ("adapprox", "optplan", {"rank": 8}, "Adapprox", {"rank": 8}),
        ("came", "came_pytorch", {}, "CAME", {"lr": 1e-5}),
        ("adamw-8bit", "torchao", {"block_size": 512}, "AdamW8bit", {"lr": 1e-5}),
        ("soap", "pytorch_optimizer", {"max_precond_dim": 100}, "SOAP", {"max_precondition_dim": 100}),
    ],
)
def test_the_optimizer_is_the_one_exported(
    optimizer: str,
    implementation: str,
    options: dict[str, Any],
    name: str,
    group: dict[str, Any],
    model: Any,
    tmp_path: Path,
) -> None:
    built = trainer(model, tmp_path, optimizer, implementation, options).create_optimizer()
    assert type(built).__name__ == name
    assert {key: built.param_groups[0].get(key) for key in group} == group


@pytest.mark.parametrize(
    ("optimizer", "implementation", "options", "group"),
    [
        ("galore", "galore_torch", {"rank": 4}, {"rank": 4, "update_proj_gap": 200, "scale": 0.25}),
        ("apollo", "apollo_torch", {"rank": 4, "scale_type": "tensor"}, {"rank": 4, "scale_type": "tensor"}),
    ],
)
def test_every_linear_layer_is_projected(
    optimizer: str, implementation: str, options: dict[str, Any], group: dict[str, Any], model: Any, tmp_path: Path
) -> None:
    built = trainer(model, tmp_path, optimizer, implementation, options).create_optimizer()
    projected = next(found for found in built.param_groups if "rank" in found)
    assert {key: projected[key] for key in group} == group
    # Four of attention, three of the MLP, and the output head.
    assert len(projected["params"]) == 8
