"""Every export loads in the parser of the program that it is for.

transformers and accelerate are test dependencies. axolotl, LLaMA-Factory, torchtitan and DeepSpeed are installed beside
them by `.ci/trainers`, without what they need for training; where they are missing their tests are skipped.
"""

from __future__ import annotations

import enum
import sys
import types
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from optplan.planner.errors import ConfigError
from optplan.planner.records import StepConfig
from optplan.planner.trainers.export import export

OPTIMIZERS = [
    ("adamw", "fused", {}),
    ("adamw", "foreach", {}),
    ("micro-adam", "optplan", {"window": 20}),
    ("adam-mini", "official", {}),
    ("galore", "galore_torch", {"rank": 64}),
    ("adamw-8bit", "bitsandbytes", {}),
    ("adamw-fp8", "torchao", {}),
    ("sgd", "foreach", {}),
]
STEPS: list[dict[str, Any]] = [
    {},
    {"precision": "amp", "checkpointing": "full", "clip_grad_norm": 1.0, "grad_accum": 8},
    {"precision": "fp32", "checkpointing": "full-reentrant", "attention": "eager"},
    {"precision": "mixed"},
    {"precision": "fp16-amp", "fused_loss": "liger"},
    {"attention": "flash", "checkpointing": "selective"},
    {"gpus": 4, "sharding": "ddp"},
    {"gpus": 4, "sharding": "zero2", "precision": "mixed"},
    {"gpus": 4, "sharding": "fsdp2", "precision": "mixed", "checkpointing": "full"},
    {"step_in_backward": True},
]


def exports(target: str) -> list[tuple[dict[str, Any], str]]:
    """The steps that the target can express, with the file of each."""
    base: dict[str, Any] = {
        "precision": "bf16",
        "batch_size": 2,
        "seq_len": 1024,
        "grad_accum": 1,
        "checkpointing": "none",
        "attention": "sdpa",
        "gpus": 1,
        "sharding": "none",
    }
    found = []
    for optimizer, implementation, options in OPTIMIZERS:
        for step in STEPS:
            config = StepConfig(**base | step)
            try:
                result = export(
                    target,
                    model="qwen3-8b",
                    optimizer=optimizer,
                    implementation=implementation,
                    options=options,
                    config=config,
                )
            except ConfigError:
                continue
            found.append((base | step, result.text))
    return found


@pytest.mark.parametrize(
    ("target", "num"),
    [
        ("hf-args", 56),
        ("torchtitan", 10),
        ("axolotl", 32),
        ("llama-factory", 30),
        ("deepspeed", 40),
        ("accelerate", 64),
    ],
)
def test_the_number_of_files_checked(target: str, num: int) -> None:
    # Optimizers times steps that the program has; the tests below must not pass because nothing is written.
    assert len(exports(target)) == num


def test_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = import_module("transformers")
    # On a machine without a GPU the arguments refuse 16 bits, whatever else they say.
    monkeypatch.setattr(transformers.training_args, "is_torch_bf16_gpu_available", lambda: True)
    parser = transformers.HfArgumentParser(transformers.TrainingArguments)
    for step, text in exports("hf-args"):
        path = tmp_path / "training_args.yaml"
        path.write_text(text)
        (arguments,) = parser.parse_yaml_file(str(path))
        assert arguments.per_device_train_batch_size == 2
        assert arguments.gradient_accumulation_steps == step["grad_accum"]
        assert arguments.max_grad_norm == (step.get("clip_grad_norm") or 0.0)
        assert arguments.bf16 is (step["precision"] in ("amp", "mixed"))
        assert arguments.gradient_checkpointing is (step["checkpointing"] != "none")


def test_accelerate(tmp_path: Path) -> None:
    load = import_module("accelerate.commands.config.config_args").load_config_from_file
    for step, text in exports("accelerate"):
        path = tmp_path / "accelerate.yaml"
        path.write_text(text)
        config = load(str(path))
        assert config.num_processes == step["gpus"]
        assert bool(config.fsdp_config) is step["sharding"].startswith("fsdp2")


def test_deepspeed(tmp_path: Path) -> None:
    _installed("deepspeed")
    parser = import_module("deepspeed.runtime.config").DeepSpeedConfig
    for step, text in exports("deepspeed"):
        path = tmp_path / "ds_config.json"
        path.write_text(text)
        config = parser(str(path))
        assert config.train_micro_batch_size_per_gpu == 2
        assert config.gradient_accumulation_steps == step["grad_accum"]
        assert config.zero_config.stage == (2 if step["sharding"] == "zero2" else 0)
        assert config.bfloat16_config.enabled is (step["precision"] in ("bf16", "mixed"))
        assert config.torch_autocast_enabled is (step["precision"] in ("amp", "fp16-amp"))


def test_torchtitan(tmp_path: Path) -> None:
    _installed("torchtitan")
    manager = import_module("torchtitan.config.manager").ConfigManager
    for step, text in exports("torchtitan"):
        path = tmp_path / "train.toml"
        path.write_text(text)
        config = manager().parse_args(["--job.config_file", str(path)])
        assert (config.model.name, config.model.flavor) == ("qwen3", "8B")
        assert (config.training.local_batch_size, config.training.seq_len) == (2, 1024)
        assert config.training.global_batch_size == 2 * step["grad_accum"] * step["gpus"]
        assert config.optimizer.early_step_in_backward is step.get("step_in_backward", False)
        assert config.activation_checkpoint.mode == step["checkpointing"]


def test_axolotl(tmp_path: Path) -> None:
    _installed("axolotl")
    schema = import_module("axolotl.utils.schemas.config").AxolotlInputConfig
    liger = set(import_module("axolotl.integrations.liger.args").LigerArgs.model_fields)
    for step, text in exports("axolotl"):
        fields = yaml.safe_load(text)
        assert set(fields) <= set(schema.model_fields) | liger
        config = schema(**{key: value for key, value in fields.items() if key not in liger})
        assert (config.micro_batch_size, config.sequence_len) == (2, 1024)
        assert config.gradient_accumulation_steps == step["grad_accum"]
        assert config.attn_implementation == {"flash": "flash_attention_2"}.get(step["attention"], step["attention"])
        assert config.gradient_checkpointing is (step["checkpointing"] != "none")


def test_llama_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _installed("llamafactory")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds_config.json").write_text(next(text for step, text in exports("deepspeed") if step["gpus"] == 4))
    # Of the package for data sets, which is large, the arguments use one name.
    datasets = types.ModuleType("datasets")
    monkeypatch.setattr(
        datasets, "DownloadMode", enum.Enum("DownloadMode", {"REUSE_DATASET_IF_EXISTS": "reuse"}), raising=False
    )
    if find_spec("datasets") is None:
        monkeypatch.setitem(sys.modules, "datasets", datasets)
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")
    parse = import_module("llamafactory.hparams.parser")._parse_train_args
    for step, text in exports("llama-factory"):
        model, data, training, tuning, _ = parse(yaml.safe_load(text) | {"use_cpu": True})
        assert (training.per_device_train_batch_size, data.cutoff_len) == (2, 1024)
        assert training.gradient_accumulation_steps == step["grad_accum"]
        assert tuning.pure_bf16 is (step["precision"] == "bf16")
        assert training.bf16 is (step["precision"] in ("amp", "mixed"))
        assert model.disable_gradient_checkpointing is (step["checkpointing"] == "none")


def _installed(name: str) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed: .ci/trainers does it")
