"""A torchtitan job file in TOML, which torchtitan reads up to version 0.2; later versions take Python.

Source: torchtitan 0.2.2, `config/job_config.py`, `components/optimizer.py` and the flavours in `models/*/__init__.py`.
"""

from __future__ import annotations

from typing import Any

from optplan.planner.trainers import hf_fields
from optplan.planner.trainers.job import LEARNING_RATE, Export, TrainingJob
from optplan.planner.trainers.shardings import DEEPSPEED, is_fsdp, torchrun
from optplan.planner.trainers.text import toml_text

TARGET = "torchtitan"
FLAVORS: dict[tuple[str, str], str] = {
    ("llama3", "8B"): "llama-3.1-8b",
    ("llama3", "70B"): "llama-3.1-70b",
    ("llama3", "405B"): "llama-3.1-405b",
    ("qwen3", "0.6B"): "qwen3-0.6b",
    ("qwen3", "1.7B"): "qwen3-1.7b",
    ("qwen3", "4B"): "qwen3-4b",
    ("qwen3", "8B"): "qwen3-8b",
    ("qwen3", "14B"): "qwen3-14b",
    ("qwen3", "32B"): "qwen3-32b",
}
"""Model and flavour to the catalogue's name."""

CHECKPOINTING = {"none": "none", "full": "full", "selective": "selective"}
_DTYPES = {"bf16": ("bfloat16", "bfloat16"), "fp32": ("float32", "float32"), "amp": ("float32", "bfloat16"),
           "mixed": ("float32", "bfloat16")}  # fmt: skip


def write(job: TrainingJob) -> Export:
    """The job file.

    Raises:
        ConfigError: torchtitan lacks the model, the optimizer or a setting.
    """
    model, flavor = _flavor(job)
    by_hand = _by_hand(job)
    tables = {
        "model": {"name": model, "flavor": flavor, "hf_assets_path": f"./assets/hf/{job.model.rpartition('/')[2]}"},
        "optimizer": _optimizer(job),
        "training": _training(job),
        "parallelism": _parallelism(job),
        "activation_checkpoint": _checkpointing(job),
    }
    return Export(
        target=TARGET,
        file_name="train.toml",
        text=toml_text(tables, by_hand=by_hand),
        by_hand=by_hand,
        command=hf_fields.launch(
            job,
            torchrun(job, "-m torchtitan.train --job.config-file train.toml"),
        ),
    )


def _flavor(job: TrainingJob) -> tuple[str, str]:
    names = {name: pair for pair, name in FLAVORS.items()}
    if job.spec.name not in names:
        raise job.refuse(TARGET, f"it has no flavour of {job.spec.name}; it has {', '.join(names)}", instead="hf-args")
    return names[job.spec.name]


def _optimizer(job: TrainingJob) -> dict[str, Any]:
    if job.optimizer != "adamw" or job.implementation == "optplan" or job.settings:
        raise job.refuse(TARGET, f"its optimizers are torch's Adam and AdamW, not {job.optimizer} "
                         f"({job.implementation}) with these options", instead="hf-args")  # fmt: skip
    return {
        "name": "AdamW",
        "lr": LEARNING_RATE,
        "implementation": job.implementation,
        "early_step_in_backward": job.config.step_in_backward,
    }


def _training(job: TrainingJob) -> dict[str, Any]:
    config = job.config
    # Its fp32 parameters are under autocast on one GPU, under FSDP's own policy on several.
    wrong = "amp" if is_fsdp(job) else "mixed"
    if config.precision not in _DTYPES or config.precision == wrong:
        why = f"it has no precision like {config.precision} with --sharding {config.sharding}"
        raise job.refuse(TARGET, why, instead="hf-args")
    dtype, compute = _DTYPES[config.precision]
    return {
        "local_batch_size": config.batch_size,
        "global_batch_size": config.batch_size * config.grad_accum * config.gpus,
        "seq_len": config.seq_len,
        "max_norm": config.clip_grad_norm or 1.0,
        "dtype": dtype,
        "mixed_precision_param": compute,
        "enable_cpu_offload": config.sharding == "fsdp2-offload",
    }


def _parallelism(job: TrainingJob) -> dict[str, Any]:
    config = job.config
    if config.sharding in DEEPSPEED:
        raise job.refuse(TARGET, f"{config.sharding} is DeepSpeed's", instead="deepspeed")
    if config.sharding == "zero1":
        raise job.refuse(TARGET, "it does not build torch's ZeroRedundancyOptimizer")
    if is_fsdp(job):
        policy = "never" if config.sharding == "fsdp2-noreshard" else "always"
        replicas = config.nodes if config.sharding == "fsdp2-hybrid" else 1
        return {
            "data_parallel_replicate_degree": replicas,
            "data_parallel_shard_degree": config.gpus // replicas,
            "fsdp_reshard_after_forward": policy,
        }
    return {"data_parallel_replicate_degree": config.gpus, "data_parallel_shard_degree": 1}


def _checkpointing(job: TrainingJob) -> dict[str, Any]:
    kind = job.config.checkpointing
    if kind not in CHECKPOINTING:
        raise job.refuse(TARGET, "it recomputes without torch's reentrant way", instead="hf-args")
    option = {"selective_ac_option": "2"} if kind == "selective" else {}
    return {"mode": kind, **option}


def _by_hand(job: TrainingJob) -> list[str]:
    config = job.config
    if config.attention != "sdpa":
        raise job.refuse(TARGET, f"its attention is sdpa, not {config.attention}", instead="hf-args")
    if config.fused_loss != "none":
        instead = "python" if config.fused_loss == "chunked" else "hf-args"
        raise job.refuse(TARGET, f"it has no {config.fused_loss} loss", instead=instead)
    lines = [
        "install torchtitan==0.2.2: later versions take no TOML",
        f"fetch the tokenizer of {job.model} to hf_assets_path, and name your dataset under [training]",
        "torchtitan has its own model code: the estimate is of transformers'",
    ]
    if config.clip_grad_norm is None:
        lines.append("torchtitan always clips the gradients: estimate with --clip-grad-norm 1.0")
    if config.keep_grads:
        lines.append("torchtitan frees the gradients after each step; --keep-grads cannot be set")
    if config.empty_cache:
        lines.append("torchtitan never empties the cache; --empty-cache cannot be set")
    return lines
