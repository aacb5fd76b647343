"""What the settings of a step exclude among each other, and what is to be known of them on a GPU or for a model."""

from __future__ import annotations

import math

from optplan.planner.allocator.settings import parse_alloc_conf
from optplan.planner.errors import ConfigError, shorten
from optplan.planner.gpus import Gpu
from optplan.planner.models.spec import ModelSpec
from optplan.planner.records import StepConfig


def check_contradictions(config: StepConfig) -> None:
    """Refuse settings that cannot go together.

    Raises:
        ConfigError: Two settings contradict each other, or the norm to clip to is none.
    """
    _check_step_in_backward(config)
    norm = config.clip_grad_norm
    if norm is not None and not 0 < norm < math.inf:
        raise ConfigError(f"--clip-grad-norm must be above 0, got {shorten(norm)}")
    if config.attention == "flash" and config.padding_mask:
        raise ConfigError(
            "--attention flash and --padding-mask contradict each other: flash attention takes the padding out of the "
            "batch, which is not modelled; use --attention sdpa"
        )
    if config.attention == "flash" and config.precision == "fp32":
        raise ConfigError(
            "--attention flash and --precision fp32 contradict each other: flash attention needs bf16, amp or fp16-amp"
        )


def _check_step_in_backward(config: StepConfig) -> None:
    """A step that is taken as the gradients come leaves none for what needs all of them."""
    if not config.step_in_backward:
        return
    for flag, is_set, why in (
        ("--clip-grad-norm", config.clip_grad_norm is not None, "the norm of all gradients needs all of them"),
        (f"--grad-accum {config.grad_accum}", config.grad_accum > 1, "gradients that are used up cannot be added to"),
        ("--keep-grads", config.keep_grads, "gradients that are used up are not kept"),
    ):
        if is_set:
            raise ConfigError(f"--step-in-backward and {flag} contradict each other: {why}")


def hardware_notes(config: StepConfig, gpu: Gpu) -> tuple[str, ...]:
    """What the GPU can do only slowly."""
    if config.precision not in ("bf16", "amp", "mixed") or gpu.supports_bf16:
        return ()
    return (f"{gpu.id} has no bf16 arithmetic: torch emulates it slowly; --precision fp16-amp or fp32 runs natively",)


def allocator_notes(config: StepConfig) -> tuple[str, ...]:
    """What of the allocator's settings does nothing on a device with room for all that is asked for."""
    settings = parse_alloc_conf(config.alloc_conf)
    idle = list(settings.ignored)
    idle += ["garbage_collection_threshold"] if settings.garbage_collection_threshold else []
    idle += ["per_process_memory_fraction"] if settings.memory_fraction < 1 else []
    return tuple(f"{key} in --alloc-conf has no effect on an estimate" for key in idle)


def length_notes(model: ModelSpec, seq_len: int) -> tuple[str, ...]:
    """That the sequences are longer than those of the model's training, if they are.

    Raises:
        ConfigError: The model has no positions for them.
    """
    if seq_len <= model.max_seq_len:
        return ()
    if any(p.role == "position_embedding" and _holds_positions(p.shape, model.max_seq_len) for p in model.parameters):
        raise ConfigError(
            f"--seq-len {seq_len} is beyond the {model.max_seq_len} positions that {model.name} has embeddings for"
        )
    return (f"sequence length {seq_len} is beyond the {model.max_seq_len} tokens that {model.name} was trained for",)


def _holds_positions(shape: tuple[int, ...], max_seq_len: int) -> bool:
    # Learned positions are stored one row each, at most two rows more (OPT, RoBERTa); T5's relative buckets are fewer.
    return any(max_seq_len <= size <= max_seq_len + 2 for size in shape)
