"""transformers' `TrainingArguments` as YAML: for `HfArgumentParser.parse_yaml_file`."""

from __future__ import annotations

from typing import Any

from optplan.planner.trainers import hf_fields
from optplan.planner.trainers.job import Export, TrainingJob
from optplan.planner.trainers.shardings import DEEPSPEED, ddp_remark, is_fsdp, torchrun
from optplan.planner.trainers.text import yaml_text

TARGET = "hf-args"


def write(job: TrainingJob) -> Export:
    """The arguments, and the lines of the script that they do not cover.

    Raises:
        ConfigError: The Trainer cannot run the job.
    """
    config, by_hand = job.config, [f"load the model with {hf_fields.load_line(job)}"]
    if config.step_in_backward:
        raise job.refuse(TARGET, "the Trainer takes no optimizer step within backward")
    if config.sharding == "zero1":
        raise job.refuse(TARGET, "the Trainer does not build torch's ZeroRedundancyOptimizer")
    fields: dict[str, Any] = {"output_dir": "out", **hf_fields.size_fields(job), **precision_fields(job)}
    fields |= hf_fields.checkpointing_fields(job, target=TARGET)
    if config.fused_loss == "liger":
        fields |= {"use_liger_kernel": True, "liger_kernel_config": hf_fields.liger_kernels(job)}
    if config.fused_loss == "chunked":
        by_hand.append(hf_fields.LOSS_IN_CHUNKS)
    named = hf_fields.optimizer_fields(job)
    if named is not None:
        fields |= named
        by_hand += hf_fields.optimizer_remarks(job)
    else:
        by_hand += hf_fields.hook_lines(job, target=TARGET)
    by_hand += [f"cut or pack the data to {config.seq_len} tokens", *hf_fields.common_remarks(job)]
    by_hand += ddp_remark(job, "the Trainer")
    if config.sharding in DEEPSPEED:
        by_hand.append("write ds_config.json with --export deepspeed and add deepspeed: ds_config.json")
    if is_fsdp(job):
        by_hand.append("the sharding is the launcher's: --export accelerate writes its file")
    return Export(
        target=TARGET,
        file_name="training_args.yaml",
        text=yaml_text(fields, by_hand=by_hand),
        by_hand=by_hand,
        command=hf_fields.launch(job, _command(job)),
    )


def precision_fields(job: TrainingJob) -> dict[str, Any]:
    """Autocast or none: in pure bf16 the model itself is in bf16.

    Raises:
        ConfigError: Master weights are asked for, which the Trainer has through DeepSpeed or FSDP alone.
    """
    precision = job.config.precision
    if precision == "mixed" and not (is_fsdp(job) or job.config.sharding in DEEPSPEED):
        raise job.refuse(TARGET, "the Trainer keeps no fp32 master weights beside bf16 ones", instead="deepspeed")
    return {"bf16": precision in ("amp", "mixed"), "fp16": precision == "fp16-amp"}


def _command(job: TrainingJob) -> str:
    if is_fsdp(job):
        return "accelerate launch --config_file accelerate.yaml train.py training_args.yaml"
    if job.config.gpus > 1:
        return torchrun(job, "train.py training_args.yaml")
    return "python train.py training_args.yaml"
