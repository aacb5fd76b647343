"""What transformers' `TrainingArguments` say of a step: shared by every program that is built on its Trainer.

Source: transformers 5.23, `training_args.py` and `trainer_optimizer.py`.
"""

from __future__ import annotations

from typing import Any

from optplan.planner.step.fused_losses import NUM_CHUNKS
from optplan.planner.trainers.job import LEARNING_RATE, TrainingJob
from optplan.planner.trainers.optimizer_code import optimizer_code

OPTIMIZERS: dict[tuple[str, str], str] = {
    ("adamw", "fused"): "adamw_torch_fused",
    ("adamw", "foreach"): "adamw_torch",
    ("adafactor", "transformers"): "adafactor",
    ("sgd", "foreach"): "sgd",
    ("adamw-8bit", "bitsandbytes"): "adamw_bnb_8bit",
    ("adamw-8bit", "torchao"): "adamw_torch_8bit",
    ("adamw-4bit", "torchao"): "adamw_torch_4bit",
    ("paged-adamw-8bit", "bitsandbytes"): "paged_adamw_8bit",
    ("galore", "galore_torch"): "galore_adamw",
    ("apollo", "apollo_torch"): "apollo_adamw",
}
"""Optimizer and implementation to the value of `optim`."""

_PASSED = {"sgd": {"momentum", "nesterov"}, "galore": {"rank"}, "apollo": {"rank", "scale_type"}}
"""Options that `optim_args` can carry, by optimizer."""

_DTYPES = {"bf16": "bfloat16", "fp32": "float32", "amp": "float32", "fp16-amp": "float32", "mixed": "bfloat16"}
ATTENTION = {"sdpa": "sdpa", "eager": "eager", "flash": "flash_attention_2"}


def model_dtype(job: TrainingJob) -> str:
    """The dtype in which the model must be loaded."""
    return _DTYPES[job.config.precision]


def load_line(job: TrainingJob) -> str:
    """How a script must load the model, as the estimate takes it."""
    attention = ATTENTION[job.config.attention]
    return f'from_pretrained("{job.model}", dtype=torch.{model_dtype(job)}, attn_implementation="{attention}")'


def size_fields(job: TrainingJob) -> dict[str, Any]:
    """Micro-batch, accumulation and clipping."""
    return {
        "per_device_train_batch_size": job.config.batch_size,
        "gradient_accumulation_steps": job.config.grad_accum,
        # 0 switches off what is on by default.
        "max_grad_norm": job.config.clip_grad_norm or 0.0,
    }


def checkpointing_fields(job: TrainingJob, *, target: str) -> dict[str, Any]:
    """Activation checkpointing of every layer, or none.

    Raises:
        ConfigError: Only every second layer is to be recomputed, which the Trainer does not offer.
    """
    kind = job.config.checkpointing
    if kind == "selective":
        raise job.refuse(target, "its Trainer recomputes every layer or none, never every second one")
    fields: dict[str, Any] = {"gradient_checkpointing": kind != "none"}
    if kind != "none":
        fields["gradient_checkpointing_kwargs"] = {"use_reentrant": kind == "full-reentrant"}
    return fields


LOSS_IN_CHUNKS = (
    f"compute the loss in {NUM_CHUNKS} chunks of tokens, each head and cross entropy under torch.utils.checkpoint: "
    "--export python writes that out"
)
"""What is left to do by hand for `--fused-loss chunked`."""


def fused_loss_lines(job: TrainingJob) -> list[str]:
    """What is left to do for the loss in a program whose file says nothing of it."""
    liger = "install liger-kernel and apply its fused linear cross entropy alone"
    return {"liger": [liger], "chunked": [LOSS_IN_CHUNKS]}.get(job.config.fused_loss, [])


def liger_kernels(job: TrainingJob) -> dict[str, bool]:
    """Which of Liger's kernels the estimate stands for: the fused loss alone."""
    del job
    return {
        "fused_linear_cross_entropy": True,
        "cross_entropy": False,
        "rope": False,
        "rms_norm": False,
        "swiglu": False,
    }


def optimizer_fields(job: TrainingJob) -> dict[str, Any] | None:
    """`optim` and what belongs to it, None where the optimizer or one of its options has no name there."""
    name = OPTIMIZERS.get((job.optimizer, job.implementation))
    ours = set(job.settings) - _PASSED.get(job.optimizer, set()) - {"hf_embeddings_32bit"}
    if name is None or ours:
        return None
    fields: dict[str, Any] = {"optim": name, "learning_rate": LEARNING_RATE}
    arguments = {key: job.options[key] for key in ("momentum", "nesterov", "rank", "scale_type") if key in job.options}
    if arguments:
        fields["optim_args"] = ",".join(f"{key}={str(value).lower()}" for key, value in arguments.items())
    if job.optimizer in ("galore", "apollo"):
        fields["optim_target_modules"] = "all-linear"
    return fields


def optimizer_remarks(job: TrainingJob) -> list[str]:
    """What the Trainer does to an optimizer it builds that the estimate does not count."""
    if job.options.get("hf_embeddings_32bit") is False:
        return [
            "the Trainer keeps bitsandbytes' state of embeddings in 32 bits: estimate with "
            "--set hf_embeddings_32bit=true"
        ]
    return []


def hook_lines(job: TrainingJob, *, target: str) -> list[str]:
    """How a script gives the Trainer an optimizer that `optim` has no name for."""
    code = optimizer_code(job, target=target)
    rate = str(LEARNING_RATE)
    lines = [f"install {code.package}"] if code.package else []
    imports = "; ".join(code.imports)
    if code.takes_parameters_alone:
        keywords = {"lr": LEARNING_RATE, **code.keywords}
        return [
            *lines,
            f"build the optimizer in the script: {imports}; "
            f"Trainer(..., optimizer_cls_and_kwargs=({code.name}, {keywords!r}))",
        ]
    before = [f"before that: {' / '.join(line.strip() for line in code.before)}"] if code.before else []
    return [
        *lines,
        f"build the optimizer in the script: {imports}; Trainer(..., optimizers=({code.expression(rate)}, None))",
        *before,
    ]


def common_remarks(job: TrainingJob) -> list[str]:
    """Parts of the step that no field of the Trainer sets."""
    config = job.config
    remarks = []
    if config.keep_grads:
        remarks.append("the Trainer frees the gradients after each step; --keep-grads cannot be set")
    if config.empty_cache:
        remarks.append("call torch.cuda.empty_cache() after each step in a callback's on_step_end")
    if config.padding_mask:
        remarks.append("let the data collator give an attention_mask; the estimate counts one")
    return remarks


def launch(job: TrainingJob, command: str) -> str:
    """The command with the allocator's settings before it."""
    settings = job.config.alloc_conf
    return f"PYTORCH_CUDA_ALLOC_CONF={settings} {command}" if settings else command
