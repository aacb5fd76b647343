"""A LLaMA-Factory configuration in YAML.

Source: LLaMA-Factory 0.9.5, `hparams/*.py`, `train/trainer_utils.py`, `model/model_utils/checkpointing.py`. `bf16:
true` keeps the trained parameters in fp32 under autocast; `pure_bf16: true` trains bf16 parameters without it.
"""

from __future__ import annotations

from typing import Any

from optplan.planner.trainers import hf_fields
from optplan.planner.trainers.job import LEARNING_RATE, Export, TrainingJob, is_causal
from optplan.planner.trainers.shardings import DEEPSPEED, ddp_remark, is_fsdp
from optplan.planner.trainers.text import yaml_text

TARGET = "llama-factory"
_PRECISIONS: dict[str, dict[str, bool]] = {
    "bf16": {"pure_bf16": True},
    "amp": {"bf16": True},
    "fp16-amp": {"fp16": True},
    "fp32": {"bf16": False, "fp16": False},
    # DeepSpeed's engine keeps the fp32 master weights.
    "mixed": {"bf16": True},
}
_ATTENTION = {"sdpa": "sdpa", "flash": "fa2", "eager": "disabled"}


def write(job: TrainingJob) -> Export:
    """The configuration, with a placeholder for the dataset.

    Raises:
        ConfigError: LLaMA-Factory cannot run the job.
    """
    config = job.config
    _check(job)
    by_hand = [
        "name your own dataset and the template of your model",
        *ddp_remark(job, "LLaMA-Factory"),
        *hf_fields.common_remarks(job),
    ]
    fields: dict[str, Any] = {
        "model_name_or_path": job.model,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "dataset": "alpaca_en_demo",
        "template": "default",
        "cutoff_len": config.seq_len,
        "output_dir": "out",
        **hf_fields.size_fields(job),
        "learning_rate": LEARNING_RATE,
        **_PRECISIONS[config.precision],
        "flash_attn": _ATTENTION[config.attention],
        "disable_gradient_checkpointing": config.checkpointing == "none",
        "use_reentrant_gc": config.checkpointing == "full-reentrant",
        **_optimizer(job),
        **_sharding(job),
    }
    if config.checkpointing == "none":
        fields.pop("use_reentrant_gc")
    by_hand += hf_fields.optimizer_remarks(job)
    if "deepspeed" in fields:
        by_hand.append("write ds_config.json beside it with --export deepspeed")
    start = "FORCE_TORCHRUN=1 " if config.gpus > 1 else ""
    return Export(
        target=TARGET,
        file_name="llama_factory.yaml",
        text=yaml_text(fields, by_hand=by_hand),
        by_hand=by_hand,
        command=hf_fields.launch(job, f"{start}llamafactory-cli train llama_factory.yaml"),
    )


def _check(job: TrainingJob) -> None:
    config = job.config
    if not is_causal(job.spec):
        raise job.refuse(TARGET, "it trains causal language models only", instead="hf-args")
    if config.step_in_backward:
        raise job.refuse(TARGET, "its Trainer takes no optimizer step within backward")
    if config.sharding == "zero1":
        raise job.refuse(TARGET, "it does not build torch's ZeroRedundancyOptimizer")
    if config.precision == "mixed" and config.sharding not in DEEPSPEED:
        raise job.refuse(TARGET, f"it has no precision like {config.precision}", instead="deepspeed")
    if config.fused_loss == "liger":
        raise job.refuse(
            TARGET, "it applies all of Liger's kernels or none, never the fused loss alone", instead="hf-args"
        )
    if config.fused_loss == "chunked":
        raise job.refuse(TARGET, "it has no loss that cuts the logits into chunks")
    if is_fsdp(job):
        raise job.refuse(TARGET, "its FSDP is set up by accelerate's file", instead="accelerate")
    # Refuses every second layer, which the Trainer cannot do.
    hf_fields.checkpointing_fields(job, target=TARGET)


def _optimizer(job: TrainingJob) -> dict[str, Any]:
    """The optimizers that LLaMA-Factory builds itself, else those of transformers' Trainer."""
    if (job.optimizer, job.implementation) == ("adam-mini", "official") and job.options["version"] == "1.1.1":
        return {"use_adam_mini": True}
    named = hf_fields.optimizer_fields(job)
    if named is None:
        raise job.refuse(
            TARGET,
            f"it builds no {job.optimizer} ({job.implementation}) with these options, and takes none from outside",
            instead="hf-args",
        )
    return {key: value for key, value in named.items() if key != "learning_rate"}


def _sharding(job: TrainingJob) -> dict[str, Any]:
    sharding = job.config.sharding
    if sharding in DEEPSPEED:
        return {"deepspeed": "ds_config.json"}
    return {}
