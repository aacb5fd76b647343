"""A configuration file of `accelerate launch`: processes, precision and FSDP; the training script does the rest.

Source: accelerate 1.15, `commands/config/config_args.py` and `utils/dataclasses.py`.
"""

from __future__ import annotations

from typing import Any

from optplan.planner.trainers import hf_fields
from optplan.planner.trainers.job import LEARNING_RATE, Export, TrainingJob
from optplan.planner.trainers.optimizer_code import optimizer_code
from optplan.planner.trainers.shardings import DEEPSPEED, ddp_remark, is_fsdp
from optplan.planner.trainers.text import yaml_text

TARGET = "accelerate"
_AUTOCAST = {"amp": "bf16", "fp16-amp": "fp16", "bf16": "no", "fp32": "no", "mixed": "bf16"}


def write(job: TrainingJob) -> Export:
    """The launcher's file.

    Raises:
        ConfigError: Its launcher cannot set up the job.
    """
    config = job.config
    if config.sharding in DEEPSPEED:
        raise job.refuse(TARGET, f"{config.sharding} is DeepSpeed's", instead="deepspeed")
    if config.sharding == "zero1":
        raise job.refuse(TARGET, "it does not build torch's ZeroRedundancyOptimizer")
    if config.sharding == "fsdp2-hybrid":
        raise job.refuse(TARGET, "its FSDP shards over all processes", instead="torchtitan")
    if config.precision == "mixed" and not is_fsdp(job):
        raise job.refuse(TARGET, "only its FSDP keeps fp32 parameters beside bf16 ones", instead="deepspeed")
    fields: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": _distributed_type(job),
        "mixed_precision": _AUTOCAST[config.precision],
        "num_machines": config.nodes,
        "num_processes": config.gpus,
        "machine_rank": 0,
        "use_cpu": False,
    }
    if is_fsdp(job):
        fields["fsdp_config"] = _fsdp(job)
    by_hand = _by_hand(job)
    return Export(
        target=TARGET,
        file_name="accelerate.yaml",
        text=yaml_text(fields, by_hand=by_hand),
        by_hand=by_hand,
        command=hf_fields.launch(job, "accelerate launch --config_file accelerate.yaml train.py"),
    )


def _distributed_type(job: TrainingJob) -> str:
    if is_fsdp(job):
        return "FSDP"
    return "MULTI_GPU" if job.config.gpus > 1 else "NO"


def _fsdp(job: TrainingJob) -> dict[str, Any]:
    return {
        "fsdp_version": 2,
        "fsdp_reshard_after_forward": job.config.sharding != "fsdp2-noreshard",
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_activation_checkpointing": job.config.checkpointing == "full",
        "fsdp_offload_params": job.config.sharding == "fsdp2-offload",
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    }


def _by_hand(job: TrainingJob) -> list[str]:
    config, code = job.config, optimizer_code(job, target=TARGET)
    sharded = _distributed_type(job) == "FSDP"
    lines = [
        f"load the model with {hf_fields.load_line(job)}"
        if not (sharded and config.precision == "mixed")
        else f'load the model in fp32: from_pretrained("{job.model}", dtype=torch.float32)',
        f"micro-batches of {config.batch_size} sequences of {config.seq_len} tokens",
        f"Accelerator(gradient_accumulation_steps={config.grad_accum})",
        *([f"install {code.package}"] if code.package else []),
        f"{'; '.join([*code.imports, *(line.strip() for line in code.before)])}; "
        f"optimizer = {code.expression(str(LEARNING_RATE))}",
    ]
    if config.clip_grad_norm is not None:
        lines.append(f"accelerator.clip_grad_norm_(model.parameters(), {config.clip_grad_norm})")
    if config.checkpointing in ("full", "full-reentrant") and not sharded:
        reentrant = config.checkpointing == "full-reentrant"
        lines.append(f'model.gradient_checkpointing_enable({{"use_reentrant": {reentrant}}})')
    return lines + _rest_by_hand(job)


def _rest_by_hand(job: TrainingJob) -> list[str]:
    config = job.config
    lines = ddp_remark(job, "accelerate")
    if config.checkpointing == "selective":
        lines.append("wrap every second layer with torch.distributed's checkpoint_wrapper")
    lines += hf_fields.fused_loss_lines(job)
    if config.step_in_backward:
        lines.append("step each parameter's own optimizer in register_post_accumulate_grad_hook")
    if config.keep_grads:
        lines.append("optimizer.zero_grad(set_to_none=False)")
    if config.empty_cache:
        lines.append("torch.cuda.empty_cache() after each step")
    if config.padding_mask:
        lines.append("give the model an attention_mask; the estimate counts one")
    return lines
