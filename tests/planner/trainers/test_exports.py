"""What each training program is told, key by key, and what it is said to be unable to do."""

from __future__ import annotations

import json
import tomllib
from typing import Any

import pytest
import yaml

from optplan.planner.errors import ConfigError
from optplan.planner.records import StepConfig
from optplan.planner.trainers.export import TARGETS, export, write_export

PLAIN = StepConfig(
    precision="bf16",
    batch_size=2,
    seq_len=2048,
    grad_accum=4,
    checkpointing="full",
    attention="sdpa",
    gpus=1,
    sharding="none",
)


def changed(**fields: Any) -> StepConfig:
    return StepConfig(**{name: getattr(PLAIN, name) for name in StepConfig.__struct_fields__} | fields)


def written(target: str, optimizer: str = "adamw", implementation: str = "fused", **fields: Any) -> Any:
    options = fields.pop("options", {})
    return export(
        target,
        model=fields.pop("model", "llama-3.1-8b"),
        optimizer=optimizer,
        implementation=implementation,
        options=options,
        config=changed(**fields),
    )


def test_the_targets() -> None:
    assert TARGETS == ("python", "hf-args", "torchtitan", "axolotl", "llama-factory", "deepspeed", "accelerate")


def test_hf_arguments() -> None:
    assert yaml.safe_load(written("hf-args", clip_grad_norm=0.5).text) == {
        "output_dir": "out",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_grad_norm": 0.5,
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "optim": "adamw_torch_fused",
        "learning_rate": 1e-5,
    }


@pytest.mark.parametrize(
    ("optimizer", "implementation", "options", "fields"),
    [
        ("adamw", "foreach", {}, {"optim": "adamw_torch"}),
        ("adafactor", "transformers", {}, {"optim": "adafactor"}),
        ("adamw-8bit", "bitsandbytes", {"hf_embeddings_32bit": True}, {"optim": "adamw_bnb_8bit"}),
        ("adamw-8bit", "torchao", {}, {"optim": "adamw_torch_8bit"}),
        ("adamw-4bit", "torchao", {}, {"optim": "adamw_torch_4bit"}),
        ("paged-adamw-8bit", "bitsandbytes", {}, {"optim": "paged_adamw_8bit"}),
        ("sgd", "foreach", {"momentum": 0.5}, {"optim": "sgd", "optim_args": "momentum=0.5,nesterov=false"}),
        (
            "galore",
            "galore_torch",
            {"rank": 64},
            {"optim": "galore_adamw", "optim_args": "rank=64", "optim_target_modules": "all-linear"},
        ),
        (
            "apollo",
            "apollo_torch",
            {"scale_type": "tensor"},
            {"optim": "apollo_adamw", "optim_args": "rank=256,scale_type=tensor", "optim_target_modules": "all-linear"},
        ),
    ],
)
def test_optimizers_that_the_trainer_has_a_name_for(
    optimizer: str, implementation: str, options: dict[str, Any], fields: dict[str, Any]
) -> None:
    document = yaml.safe_load(written("hf-args", optimizer, implementation, options=options).text)
    assert {key: value for key, value in document.items() if key.startswith("optim")} == fields


@pytest.mark.parametrize(
    ("optimizer", "implementation", "options", "line"),
    [
        (
            "micro-adam",
            "optplan",
            {"window": 20},
            "build the optimizer in the script: from optplan.optim_impls import MicroAdam; "
            "Trainer(..., optimizer_cls_and_kwargs=(MicroAdam, {'lr': 1e-05, 'window': 20}))",
        ),
        (
            "adam-mini",
            "optplan",
            {},
            "build the optimizer in the script: from optplan.optim_impls import AdamMini; "
            "Trainer(..., optimizers=(AdamMini.from_module(model, lr=1e-05), None))",
        ),
        (
            "adamw",
            "for-loop",
            {},
            "build the optimizer in the script: import torch; "
            "Trainer(..., optimizer_cls_and_kwargs=(torch.optim.AdamW, {'lr': 1e-05, 'foreach': False}))",
        ),
        (
            "adamw-8bit",
            "bitsandbytes",
            {"min_8bit_size": 512},
            "build the optimizer in the script: import bitsandbytes as bnb; import torch; "
            "Trainer(..., optimizer_cls_and_kwargs=(bnb.optim.AdamW8bit, {'lr': 1e-05, 'min_8bit_size': 512}))",
        ),
    ],
)
def test_other_optimizers_are_built_in_the_script(
    optimizer: str, implementation: str, options: dict[str, Any], line: str
) -> None:
    result = written("hf-args", optimizer, implementation, options=options)
    assert "optim" not in yaml.safe_load(result.text)
    assert line in result.by_hand


def test_torchtitan() -> None:
    result = written("torchtitan", clip_grad_norm=1.0, checkpointing="selective", step_in_backward=False)
    assert tomllib.loads(result.text) == {
        "model": {"name": "llama3", "flavor": "8B", "hf_assets_path": "./assets/hf/Llama-3.1-8B"},
        "optimizer": {"name": "AdamW", "lr": 1e-5, "implementation": "fused", "early_step_in_backward": False},
        "training": {
            "local_batch_size": 2,
            "global_batch_size": 8,
            "seq_len": 2048,
            "max_norm": 1.0,
            "dtype": "bfloat16",
            "mixed_precision_param": "bfloat16",
            "enable_cpu_offload": False,
        },
        "parallelism": {"data_parallel_replicate_degree": 1, "data_parallel_shard_degree": 1},
        "activation_checkpoint": {"mode": "selective", "selective_ac_option": "2"},
    }


def test_torchtitan_shards_within_nodes() -> None:
    result = written("torchtitan", precision="mixed", sharding="fsdp2-hybrid", gpus=16, nodes=2, clip_grad_norm=1.0)
    document = tomllib.loads(result.text)
    assert document["parallelism"] == {
        "data_parallel_replicate_degree": 2,
        "data_parallel_shard_degree": 8,
        "fsdp_reshard_after_forward": "always",
    }
    assert (document["training"]["dtype"], document["training"]["mixed_precision_param"]) == ("float32", "bfloat16")
    assert result.command.startswith("torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 ")


def test_the_dtype_of_the_state_reaches_our_optimizers() -> None:
    job = {"model": "gpt2", "options": {}, "config": changed(), "state_dtype": "fp32"}
    result = export("hf-args", optimizer="adamw", implementation="optplan", **job)
    assert (
        "build the optimizer in the script: import torch; from optplan.optim_impls import AdamW; "
        "Trainer(..., optimizer_cls_and_kwargs=(AdamW, {'lr': 1e-05, 'state_dtype': torch.float32}))" in result.by_hand
    )
    with pytest.raises(ConfigError) as caught:
        export("hf-args", optimizer="adamw", implementation="fused", **job)
    assert str(caught.value) == (
        "--export hf-args is not possible: adamw (fused) has no argument for the dtype of its state"
    )


def test_axolotl() -> None:
    document = yaml.safe_load(written("axolotl", "came", "came_pytorch", fused_loss="liger").text)
    expected = {
        "base_model": "meta-llama/Llama-3.1-8B",
        "sequence_len": 2048,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "bf16": True,
        "attn_implementation": "sdpa",
        "gradient_checkpointing": True,
        "optimizer": "came_pytorch",
        "plugins": ["axolotl.integrations.liger.LigerPlugin"],
        "liger_fused_linear_cross_entropy": True,
    }
    assert {key: document[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("precision", "fields"),
    [
        ("bf16", {"pure_bf16": True}),
        ("amp", {"bf16": True}),
        ("fp16-amp", {"fp16": True}),
        ("fp32", {"bf16": False, "fp16": False}),
    ],
)
def test_llama_factory(precision: str, fields: dict[str, bool]) -> None:
    document = yaml.safe_load(written("llama-factory", "adam-mini", "official", precision=precision).text)
    assert {key: document.get(key) for key in ("pure_bf16", "bf16", "fp16") if key in document} == fields
    assert document["use_adam_mini"] is True
    assert (document["disable_gradient_checkpointing"], document["use_reentrant_gc"]) == (False, False)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"precision": "mixed"},
            {
                "bf16": {"enabled": True},
                "zero_optimization": {"stage": 0},
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
            },
        ),
        (
            {"precision": "bf16", "sharding": "zero2", "gpus": 2},
            {
                "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True},
                "zero_optimization": {"stage": 2},
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
            },
        ),
        (
            {"precision": "amp"},
            {
                "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
                "zero_optimization": {"stage": 0},
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
            },
        ),
    ],
)
def test_deepspeed(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    sizes = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4, "gradient_clipping": 0.0}
    assert json.loads(written("deepspeed", **fields).text) == sizes | expected


def test_deepspeed_takes_other_optimizers_from_the_script() -> None:
    result = written("deepspeed", "micro-adam", "optplan", precision="amp")
    assert json.loads(result.text)["zero_allow_untested_optimizer"] is True
    assert (
        "from optplan.optim_impls import MicroAdam; deepspeed.initialize(model=model, "
        "optimizer=MicroAdam(model.parameters(), lr=1e-05), config=...)" in result.by_hand
    )


def test_accelerate_sets_up_fsdp() -> None:
    result = written("accelerate", precision="mixed", sharding="fsdp2-noreshard", gpus=4)
    assert yaml.safe_load(result.text) == {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP",
        "mixed_precision": "bf16",
        "num_machines": 1,
        "num_processes": 4,
        "machine_rank": 0,
        "use_cpu": False,
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_reshard_after_forward": False,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_activation_checkpointing": True,
            "fsdp_offload_params": False,
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        },
    }


@pytest.mark.parametrize(
    ("target", "arguments", "sentence"),
    [
        (
            "torchtitan",
            {"optimizer": "micro-adam", "implementation": "optplan"},
            "its optimizers are torch's Adam and AdamW, not micro-adam (optplan) with these options; "
            "try --export hf-args",
        ),
        (
            "torchtitan",
            {"precision": "mixed"},
            "it has no precision like mixed with --sharding none; try --export hf-args",
        ),
        (
            "llama-factory",
            {"optimizer": "adapprox", "implementation": "optplan"},
            "it builds no adapprox (optplan) with these options, and takes none from outside; try --export hf-args",
        ),
        (
            "axolotl",
            {"precision": "amp"},
            "it loads the model in 16 bits for autocast, which --precision amp is not; try --export llama-factory",
        ),
        (
            "hf-args",
            {"checkpointing": "selective"},
            "its Trainer recomputes every layer or none, never every second one; try --export python",
        ),
        (
            "hf-args",
            {"step_in_backward": True, "grad_accum": 1},
            "the Trainer takes no optimizer step within backward; try --export python",
        ),
        (
            "deepspeed",
            {},
            "without ZeRO its bf16 engine keeps fp32 master weights, which the step has not; try --export python",
        ),
        ("python", {"model": "bert-base"}, "the script trains causal language models only; try --export hf-args"),
        (
            "python",
            {"optimizer": "muon", "implementation": "torch"},
            "muon (torch) is not a single class over the model's parameters; build it as its documentation says",
        ),
        (
            "axolotl",
            {"fused_loss": "chunked"},
            "its chunked_cross_entropy casts the logits chunk by chunk and holds all of them; try --export python",
        ),
        (
            "llama-factory",
            {"fused_loss": "chunked"},
            "it has no loss that cuts the logits into chunks; try --export python",
        ),
        ("torchtitan", {"fused_loss": "chunked"}, "it has no chunked loss; try --export python"),
    ],
)
def test_what_a_program_cannot_do_is_said(target: str, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        written(target, **arguments)
    assert str(caught.value) == f"--export {target} is not possible: {sentence}"


@pytest.mark.parametrize("target", ["hf-args", "deepspeed", "accelerate"])
def test_a_loss_in_chunks_is_left_to_the_script(target: str) -> None:
    precision = {"deepspeed": {"precision": "mixed", "sharding": "zero2", "gpus": 2}}.get(target, {})
    line = (
        "compute the loss in 8 chunks of tokens, each head and cross entropy under torch.utils.checkpoint: "
        "--export python writes that out"
    )
    assert line in written(target, fused_loss="chunked", **precision).by_hand
    assert line not in written(target, fused_loss="liger", **precision).by_hand


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        written("axolot")
    assert str(caught.value) == "unknown target for --export 'axolot'; nearest: axolotl"


def test_the_allocators_settings_come_with_the_command() -> None:
    result = written("hf-args", alloc_conf="expandable_segments:True")
    assert result.command == "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python train.py training_args.yaml"


def test_an_export_is_written_under_its_usual_name(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = written("torchtitan")
    assert str(write_export(result)) == "train.toml"
    assert (tmp_path / "train.toml").read_text() == result.text
