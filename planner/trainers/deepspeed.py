"""A DeepSpeed configuration: micro-batch, precision, ZeRO stage, and the optimizers that DeepSpeed knows.

Source: DeepSpeed 0.19.8, `runtime/config.py` and `runtime/precision_config.py`.
"""

from __future__ import annotations

from typing import Any

from optplan.planner.trainers import hf_fields
from optplan.planner.trainers.job import LEARNING_RATE, Export, TrainingJob
from optplan.planner.trainers.optimizer_code import optimizer_code
from optplan.planner.trainers.shardings import DEEPSPEED_STAGES
from optplan.planner.trainers.text import json_text

TARGET = "deepspeed"
_MODEL_DTYPES = {"bf16": "bfloat16", "mixed": "bfloat16", "amp": "float32", "fp16-amp": "float32", "fp32": "float32"}


def write(job: TrainingJob) -> Export:
    """The configuration for `deepspeed.initialize`, and what the script adds.

    Raises:
        ConfigError: DeepSpeed has no such step.
    """
    config = job.config
    if config.sharding not in DEEPSPEED_STAGES:
        instead = "python" if config.sharding == "zero1" else "accelerate"
        raise job.refuse(TARGET, f"{config.sharding} is torch's own sharding", instead=instead)
    if config.step_in_backward:
        raise job.refuse(TARGET, "its engine takes no optimizer step within backward")
    fields: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": config.grad_accum,
        "gradient_clipping": config.clip_grad_norm or 0.0,
        **_precision(job),
        "zero_optimization": {"stage": DEEPSPEED_STAGES[config.sharding]},
    }
    optimizer = _optimizer(job)
    fields |= {"optimizer": optimizer} if optimizer else {"zero_allow_untested_optimizer": True}
    return Export(
        target=TARGET,
        file_name="ds_config.json",
        text=json_text(fields),
        by_hand=_by_hand(job, known=optimizer is not None),
        command=hf_fields.launch(
            job, f"deepspeed --num_gpus {config.gpus // config.nodes} train.py --deepspeed_config ds_config.json"
        ),
    )


def _precision(job: TrainingJob) -> dict[str, Any]:
    """DeepSpeed's `bf16` keeps fp32 master weights; autocast is a setting of its own."""
    precision = job.config.precision
    if precision == "mixed":
        return {"bf16": {"enabled": True}}
    if precision == "bf16":
        if DEEPSPEED_STAGES[job.config.sharding] == 0:
            raise job.refuse(TARGET, "without ZeRO its bf16 engine keeps fp32 master weights, which the step has not")
        return {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
    autocast = {"amp": "bfloat16", "fp16-amp": "float16"}.get(precision)
    return {"torch_autocast": {"enabled": True, "dtype": autocast}} if autocast else {}


def _optimizer(job: TrainingJob) -> dict[str, Any] | None:
    """The optimizers of the same state that DeepSpeed builds itself."""
    if job.optimizer != "adamw" or job.settings or job.implementation not in ("fused", "foreach"):
        return None
    parameters: dict[str, Any] = {"lr": LEARNING_RATE}
    if job.implementation == "foreach":
        parameters["torch_adam"] = True
    return {"type": "AdamW", "params": parameters}


def _by_hand(job: TrainingJob, *, known: bool) -> list[str]:
    config = job.config
    attention, dtype = hf_fields.ATTENTION[config.attention], _MODEL_DTYPES[config.precision]
    lines = [
        f'load the model with from_pretrained("{job.model}", dtype=torch.{dtype}, attn_implementation="{attention}")',
        f"cut or pack the data to {config.seq_len} tokens",
    ]
    if known and job.implementation == "fused":
        lines.append("DeepSpeed builds its own FusedAdam for AdamW: the state is that of torch's")
    if not known:
        code = optimizer_code(job, target=TARGET)
        lines += [f"install {code.package}"] if code.package else []
        statements = [*code.imports, *(line.strip() for line in code.before)]
        built = code.expression(str(LEARNING_RATE))
        lines.append(f"{'; '.join(statements)}; deepspeed.initialize(model=model, optimizer={built}, config=...)")
    if config.checkpointing == "selective":
        lines.append("wrap every second layer with torch.distributed's checkpoint_wrapper")
    elif config.checkpointing != "none":
        reentrant = config.checkpointing == "full-reentrant"
        lines.append(f'model.gradient_checkpointing_enable({{"use_reentrant": {reentrant}}})')
    lines += hf_fields.fused_loss_lines(job)
    lines.append("DeepSpeed's flat buffers come on top: the estimate is of a step without them")
    return lines + hf_fields.common_remarks(job)
