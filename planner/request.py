"""What a user asks of the planner, checked: every flag in range and no two in contradiction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypedDict, Unpack

import msgspec

from optplan.planner.allocator.settings import AllocatorSettings, parse_alloc_conf
from optplan.planner.dtypes import SHORT_NAMES, Dtype
from optplan.planner.errors import ConfigError, shorten, unknown
from optplan.planner.gpus import Gpu, custom_gpu, load_gpu
from optplan.planner.models.spec import ModelSpec
from optplan.planner.precision import FULLY_SHARDED_MIXED, PRECISIONS, PrecisionPolicy
from optplan.planner.records import StepConfig
from optplan.planner.request_checks import allocator_notes, check_contradictions, hardware_notes, length_notes
from optplan.planner.sharding.base import Ranks, Strategy
from optplan.planner.sharding.checks import check_sharding, data_ranks
from optplan.planner.sharding.clusters import usual_num_nodes
from optplan.planner.sharding.nccl import nccl_memory
from optplan.planner.sharding.pipeline import SCHEDULES, Stage, stage_part
from optplan.planner.sharding.registry import FULL_SHARDINGS, SHARDINGS, num_communicators, strategy_of
from optplan.planner.sharding.tensor_parallel import tensor_parallel_part
from optplan.planner.units import parse_size

DEFAULT_SEQ_LEN = 2048
CHECKPOINTING = ("none", "full", "full-reentrant", "selective")
FUSED_LOSS = ("none", "liger", "chunked")
ATTENTION = ("sdpa", "eager", "flash")
ENGINES = ("rules", "trace")

LIMITS = {"batch_size": 2**20, "seq_len": 2**24, "grad_accum": 2**20, "gpus": 2**16, "nodes": 2**16}
LIMITS |= {"tensor_parallel": 2**10, "pipeline_parallel": 2**10}
"""Largest values of the settings that count something; the smallest is 1."""
_CHOICES: dict[str, Iterable[str]] = {
    "precision": PRECISIONS, "checkpointing": CHECKPOINTING, "attention": ATTENTION, "fused-loss": FUSED_LOSS,
    "sharding": SHARDINGS, "engine": ENGINES, "pipeline-schedule": SCHEDULES,
}  # fmt: skip


class StepRequest(msgspec.Struct, frozen=True):
    """A training step on one GPU, everything but the optimizer; every value checked."""

    model: ModelSpec
    gpu: Gpu
    config: StepConfig
    engine: str
    state_dtype: Dtype | None
    notes: tuple[str, ...] = ()
    stage: int = 0
    part: ModelSpec | None = None

    @property
    def rank_model(self) -> ModelSpec:
        """The model as the rank that is told of has it: all of it, unless layers or their insides are divided."""
        return self.part or self.model

    @property
    def policy(self) -> PrecisionPolicy:
        """The dtypes of the resident tensors."""
        if self.config.precision == "mixed" and self.config.sharding in FULL_SHARDINGS:
            return FULLY_SHARDED_MIXED
        return PRECISIONS[self.config.precision]

    @property
    def strategy(self) -> Strategy | None:
        """How copies of the model divide the work, as the first rank sees it; None for one copy."""
        return strategy_of(self.config.sharding, data_ranks(self.config))

    @property
    def pipeline_stage(self) -> Stage:
        """The stage whose memory is told."""
        return Stage(self.stage, self.config.pipeline_parallel)

    @property
    def allocator_settings(self) -> AllocatorSettings:
        """The settings of torch's allocator."""
        return parse_alloc_conf(self.config.alloc_conf)


class StepFlags(TypedDict, total=False):
    """The step that a user asks for, by the names of the command line; what is left out has a default.

    Attributes:
        gpu: Name from the GPU catalogue; or give `memory`.
        memory: What torch may allocate, as bytes or as text such as `38GiB`; or give `gpu`.
        precision: bf16 (default), fp32, amp, mixed or fp16-amp.
        batch_size: Sequences of one micro-batch, 1 by default.
        seq_len: Tokens of one sequence; 2048 or the model's maximum, if that is smaller, when None.
        grad_accum: Micro-batches accumulated before each optimizer step, 1 by default.
        checkpointing: none (default), full, full-reentrant (torch's older way) or selective (every second layer).
        attention: sdpa, eager or flash; what transformers takes by itself when None: sdpa, but eager for Gemma 2.
        fused_loss: none (default); liger: Liger's fused linear cross entropy; chunked: the logits of one chunk of
            tokens at a time, computed again in backward.
        step_in_backward: Whether the optimizer takes each parameter's step as soon as its gradient is there.
        clip_grad_norm: Largest norm of all gradients together, to which they are scaled before the step.
        keep_grads: Whether `zero_grad` keeps the gradients' memory (`set_to_none=False`).
        padding_mask: Whether the batch comes with a padding mask that hides some tokens.
        empty_cache: Whether `torch.cuda.empty_cache()` follows every step.
        gpus: Number of GPUs on all nodes, 1 by default.
        nodes: Machines that the GPUs are spread over; as few as hold them when None.
        sharding: none (default), or how copies of the model on several GPUs divide the work: one of `SHARDINGS`.
        tensor_parallel: GPUs that share every layer, 1 by default.
        sequence_parallel: Whether they share the tokens between the blocks too.
        pipeline_parallel: Stages of consecutive layers, 1 by default; `grad_accum` micro-batches pass through them.
        pipeline_schedule: gpipe, 1f1b (default) or interleaved.
        engine: rules, or trace: the model itself is run without contents (`optplan.profilers.estimation`).
        state_dtype: fp32, bf16 or fp16 for optimizers that can keep their moments in another dtype.
        alloc_conf: Settings of torch's allocator, as in `PYTORCH_CUDA_ALLOC_CONF`; torch's own when None.
    """

    gpu: str | None
    memory: str | int | None
    precision: str
    batch_size: int
    seq_len: int | None
    grad_accum: int
    checkpointing: str
    attention: str | None
    fused_loss: str
    step_in_backward: bool
    clip_grad_norm: float | None
    keep_grads: bool
    padding_mask: bool
    empty_cache: bool
    gpus: int
    nodes: int | None
    sharding: str
    tensor_parallel: int
    sequence_parallel: bool
    pipeline_parallel: int
    pipeline_schedule: str
    engine: str
    state_dtype: str | None
    alloc_conf: str | None


def check_request(model: ModelSpec, **flags: Unpack[StepFlags]) -> StepRequest:
    """The request that these flags make.

    Args:
        model: The model to train.
        flags: As `StepFlags` describes them; what is left out has its default.

    Raises:
        ConfigError: A name is unknown, a number out of range, or two flags contradict each other.
        TypeError: A flag is none of `StepFlags`.
    """
    asked = _with_defaults(model, flags)
    for flag, allowed in _CHOICES.items():
        _one_of(flag, asked[flag.replace("-", "_")], allowed)
    for name in LIMITS:
        _in_range(name, asked[name])
    config = StepConfig(**{name: asked[name] for name in StepConfig.__struct_fields__})
    target = _target(asked["gpu"], asked["memory"])
    check_contradictions(config)
    check_sharding(config, model, engine=asked["engine"])
    target = _with_communication(target, config)
    notes = () if flags.get("attention") is not None else _attention_note(model)
    notes = (*notes, *length_notes(model, config.seq_len), *hardware_notes(config, target), *allocator_notes(config))
    return at_stage(StepRequest(model, target, config, asked["engine"], _state_dtype(asked["state_dtype"]), notes), 0)


_DEFAULTS: dict[str, Any] = {
    "gpu": None, "memory": None, "precision": "bf16", "batch_size": 1, "seq_len": None, "grad_accum": 1,
    "checkpointing": "none", "attention": None, "fused_loss": "none", "step_in_backward": False,
    "clip_grad_norm": None, "keep_grads": False, "padding_mask": False, "empty_cache": False, "gpus": 1, "nodes": None,
    "sharding": "none", "tensor_parallel": 1, "sequence_parallel": False, "pipeline_parallel": 1,
    "pipeline_schedule": "1f1b", "engine": "rules", "state_dtype": None, "alloc_conf": None,
}  # fmt: skip


def _with_defaults(model: ModelSpec, flags: StepFlags) -> dict[str, Any]:
    """Every flag with its value, those that depend on the model or on other flags worked out."""
    strange = flags.keys() - _DEFAULTS.keys()
    if strange:
        raise TypeError(f"a step has no flag {min(strange)!r}")
    asked = _DEFAULTS | dict(flags)
    if asked["attention"] is None:
        asked["attention"] = default_attention(model)
    if asked["seq_len"] is None:
        asked["seq_len"] = default_seq_len(model)
    if asked["nodes"] is None:
        _in_range("gpus", asked["gpus"])
        asked["nodes"] = usual_num_nodes(asked["gpus"], asked["gpu"] or "")
    asked["alloc_conf"] = asked["alloc_conf"] or ""
    return asked


def change_request(request: StepRequest, settings: Mapping[str, Any]) -> StepRequest:
    """The same request with some settings of the step changed.

    Raises:
        ConfigError: Two settings contradict each other now, or the GPU cannot run them.
    """
    config = msgspec.structs.replace(request.config, **settings)
    check_contradictions(config)
    check_sharding(config, request.model, engine=request.engine)
    request = msgspec.structs.replace(request, config=config, gpu=_with_communication(request.gpu, config))
    return at_stage(request, request.stage)


def at_stage(request: StepRequest, stage: int) -> StepRequest:
    """The same request, told of another stage of its pipeline.

    Raises:
        ConfigError: The model cannot be divided so.
    """
    config = request.config
    part = stage_part(request.model, Stage(stage, config.pipeline_parallel))
    part = tensor_parallel_part(part, config.tensor_parallel)
    return msgspec.structs.replace(request, stage=stage, part=None if part is request.model else part)


def default_seq_len(model: ModelSpec) -> int:
    """Tokens of a sequence when none are asked for: 2048, or the model's maximum if that is smaller."""
    return min(DEFAULT_SEQ_LEN, model.max_seq_len)


def default_attention(model: ModelSpec) -> str:
    """What transformers takes when none is asked for: sdpa, or eager where it cannot: capped scores, ALiBi of Bloom."""
    return "eager" if _lacks_sdpa(model) else "sdpa"


def _lacks_sdpa(model: ModelSpec) -> bool:
    """Whether transformers refuses sdpa for the model (`_supports_sdpa` of its class, 5.23)."""
    return model.config.get("attn_logit_softcapping") is not None or model.model_type == "bloom"


def _attention_note(model: ModelSpec) -> tuple[str, ...]:
    if not _lacks_sdpa(model):
        return ()
    why = "adds ALiBi to" if model.model_type == "bloom" else "caps"
    return (
        f"{model.name} {why} its attention scores, which sdpa cannot: eager attention is taken, as transformers does",
    )


def _one_of(flag: str, value: object, allowed: Iterable[str]) -> None:
    if value not in tuple(allowed):
        raise unknown(f"{flag} for --{flag}", str(value), allowed)


def _in_range(name: str, value: Any) -> None:
    flag = "--" + name.replace("_", "-")
    if type(value) is not int or not 1 <= value <= LIMITS[name]:
        raise ConfigError(f"{flag} must be an integer between 1 and {LIMITS[name]}, got {shorten(value)}")


def _target(gpu: str | None, memory: str | int | None) -> Gpu:
    if gpu is not None and memory is not None:
        raise ConfigError("--gpu and --memory contradict each other: give the GPU's name or a memory budget, not both")
    if gpu is not None:
        return load_gpu(gpu)
    if memory is None:
        raise ConfigError("no GPU given: add --gpu NAME (`optplan gpus` lists them) or a budget such as --memory 38GiB")
    return custom_gpu(parse_size(memory) if isinstance(memory, str) else memory)


def _with_communication(gpu: Gpu, config: StepConfig) -> Gpu:
    """The GPU with what NCCL takes of it; a budget is what torch may have, whatever else there is."""
    if gpu.is_budget:
        return gpu
    groups = num_communicators(config.sharding) + (config.tensor_parallel > 1) + (config.pipeline_parallel > 1)
    taken = nccl_memory(Ranks(config.gpus, config.nodes), num_communicators=groups, gpu=gpu.id)
    basis: Any = taken.basis if taken.bytes else ""
    return msgspec.structs.replace(gpu, communication_bytes=taken.bytes, communication_basis=basis)


def _state_dtype(text: str | None) -> Dtype | None:
    if text is None:
        return None
    if text not in SHORT_NAMES:
        raise unknown("dtype for --state-dtype", text, SHORT_NAMES)
    return SHORT_NAMES[text]
