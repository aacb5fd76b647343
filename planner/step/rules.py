"""Step rules: the timeline of the forward and backward of one training step, for the families that have them.

The rules record the operations that the transformers classes run in a steady step (every one after the first), with
random tokens, `labels = input_ids`, no cache and no padding, and of the output the loss alone kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from optplan.planner.dtypes import ITEMSIZE_BYTES
from optplan.planner.errors import ConfigError, unknown
from optplan.planner.models.spec import ModelSpec
from optplan.planner.sharding.base import Strategy
from optplan.planner.step.attention import WIDEST_FUSED_HEAD
from optplan.planner.step.causal_lm import StepModel
from optplan.planner.step.families import FAMILIES
from optplan.planner.step.graph import Tensor
from optplan.planner.step.hooks import StepHooks
from optplan.planner.step.kernels import GROUPED_ALIGNMENT_BYTES
from optplan.planner.step.operations import ACTIVATIONS, scale
from optplan.planner.step.options import StepOptions, check_options
from optplan.planner.step.program import CATEGORIES, Program, RecordedLayer, plan_layers, recorded_layers, whole_stack
from optplan.planner.step.resident import gradient_tensors, surrounding_use, write_load
from optplan.planner.step.tape import Tape
from optplan.planner.step.view import model_view
from optplan.planner.timeline import Category, TimelineBuilder

__all__ = [
    "RULED_FAMILIES",
    "StepMemory",
    "StepOptions",
    "describes",
    "has_rules",
    "record_step",
    "step_memory",
    "write_forward_backward",
    "write_load",
]

RULED_FAMILIES = tuple(FAMILIES)
"""The `model_type`s whose step is described."""


class StepMemory(msgspec.Struct, frozen=True):
    """Bytes in use by category, rounded as the allocator rounds, on top of parameters, buffers and optimizer state.

    The token ids count as activations, the libraries' workspaces as workspace.

    Attributes:
        forward: At the forward's peak.
        backward: At the backward's peak.
        after_backward: When the optimizer's step begins: the gradients, the token ids, the workspaces.
        saved: What forward leaves for backward, in all.
    """

    forward: dict[Category, int]
    backward: dict[Category, int]
    after_backward: dict[Category, int]
    saved: int = 0


def has_rules(spec: ModelSpec) -> bool:
    """Whether the timeline of a step is described for this model's family."""
    return spec.model_type in RULED_FAMILIES


def describes(spec: ModelSpec, options: StepOptions) -> bool:
    """Whether the rules describe this model's step under these options."""
    try:
        check_step(spec, options)
    except ConfigError:
        return False
    return True


def check_step(spec: ModelSpec, options: StepOptions) -> None:
    """Refuse what no rule describes and what the model's class would refuse.

    Raises:
        ConfigError: The family has no step rules, or the options do not suit it.
    """
    if not has_rules(spec):
        raise unknown("family with step rules", spec.model_type, RULED_FAMILIES)
    check_options(options)
    config = spec.config
    width = head_width(config)
    if options.attention == "flash" and width > WIDEST_FUSED_HEAD:
        raise ConfigError(
            f"flash attention takes heads of at most {WIDEST_FUSED_HEAD} elements, {spec.name} has {width}"
        )
    if options.attention == "sdpa" and config.get("attn_logit_softcapping") is not None:
        raise ConfigError(f"{spec.name} caps its attention scores, which sdpa cannot; use attention eager or flash")
    if options.attention == "eager" and config.get("reorder_and_upcast_attn"):
        raise ConfigError(
            f"{spec.name} sets reorder_and_upcast_attn, which the step rules do not model; use attention sdpa"
        )
    _check_family(spec, options)
    activation = config[FAMILIES[spec.model_type].activation]
    if activation not in ACTIVATIONS:
        raise unknown("activation for the step rules", activation, ACTIVATIONS)


_UNMODELLED = {"clip_qkv": "clips queries, keys and values", "router_jitter_noise": "adds noise to the router"}
LIGER_FAMILIES = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "phi3", "gemma", "gemma2", "gemma3_text", "olmo2",
)  # fmt: skip
"""The families for which Liger's package has a forward with the fused loss."""
_NOT_CAUSAL = ("bert", "roberta", "t5", "vit")


def fused_losses_of(spec: ModelSpec) -> tuple[str, ...]:
    """The fused losses that a model can be trained with, the one that holds least first."""
    if spec.model_type in _NOT_CAUSAL:
        return ()
    return ("liger", "chunked") if spec.model_type in LIGER_FAMILIES else ("chunked",)


def _check_family(spec: ModelSpec, options: StepOptions) -> None:
    """Refuse the options that a family does not take, and configurations with operations that no rule describes."""
    for field, what in _UNMODELLED.items():
        if spec.config.get(field):
            raise ConfigError(f"{spec.name} {what} ({field}), which the step rules do not model")
    if spec.config.get("layer_norm_elementwise_affine") is False:
        raise ConfigError(f"{spec.name} has norms without weights, which the step rules do not model")
    _check_loss(spec, options)
    if spec.model_type == "t5" and options.attention == "flash":
        raise ConfigError(f"{spec.name} adds numbers to its attention scores, which flash cannot; use attention sdpa")
    if spec.model_type == "vit":
        _check_images(spec, options)
    if "num_experts" in spec.config:
        _check_experts(spec, options)


def _check_experts(spec: ModelSpec, options: StepOptions) -> None:
    """Refuse experts that the grouped product refuses: its matrices' rows must begin at multiples of 16 bytes."""
    step = GROUPED_ALIGNMENT_BYTES // ITEMSIZE_BYTES[options.parameter_dtype]
    inner = "moe_intermediate_size" if "moe_intermediate_size" in spec.config else "intermediate_size"
    for name in ("hidden_size", inner):
        if spec.config[name] % step:
            raise ConfigError(
                f"{spec.name} has experts of {name} {spec.config[name]}, which the grouped product of their weights in "
                f"{options.parameter_dtype} refuses: it must be a multiple of {step}"
            )


def _check_loss(spec: ModelSpec, options: StepOptions) -> None:
    is_causal = spec.model_type not in _NOT_CAUSAL
    if options.fused_loss == "liger" and spec.model_type not in LIGER_FAMILIES:
        instead = "; use --fused-loss chunked" if is_causal else ""
        known = ", ".join(LIGER_FAMILIES)
        raise ConfigError(f"liger-kernel has no fused loss for {spec.model_type} models; known: {known}{instead}")
    if options.fused_loss == "chunked" and not is_causal:
        raise ConfigError(
            f"--fused-loss chunked is for causal language models, {spec.name} is none; use --fused-loss none"
        )


def _check_images(spec: ModelSpec, options: StepOptions) -> None:
    if options.seq_len != spec.max_seq_len:
        raise ConfigError(
            f"{spec.name} cuts an image into {spec.max_seq_len} positions: seq_len must be that, got {options.seq_len}"
        )
    if options.padding_mask or options.fused_loss != "none":
        raise ConfigError(f"{spec.name} classifies images: it takes no padding mask and no fused loss")


def head_width(config: dict[str, Any]) -> int:
    """Elements of one attention head, under whichever name the family gives it."""
    for name in ("head_dim", "d_kv"):
        if name in config:
            return int(config[name])
    names = ("n_embd", "n_head") if "n_embd" in config else ("hidden_size", "num_attention_heads")
    return int(config[names[0]] // config[names[1]])


def record_step(
    spec: ModelSpec, options: StepOptions, *, compressed: bool = True, strategy: Strategy | None = None
) -> Program:
    """Forward and backward of the last micro-step, recorded.

    Args:
        spec: The model.
        options: How the step is run.
        compressed: Whether layers that are alike are recorded once; otherwise every layer is.
        strategy: How the work is divided among GPUs, if it is.

    Raises:
        ConfigError: The family has no step rules, or the options do not suit it.
    """
    check_step(spec, options)
    family = FAMILIES[spec.model_type]
    kinds = family.layer_kinds(spec, options)
    layers = recorded_layers(
        [
            plan_layers(stack, least_first=family.least_first) if compressed else whole_stack(len(stack))
            for stack in family.stacks(kinds)
        ]
    )
    tape = Tape(
        resident_threads=options.resident_threads,
        parameter_dtype=options.parameter_dtype,
        autocast=options.autocast_dtype,
        keeps_gradients=options.has_gradients,
        drops_gradients=options.step_in_backward,
        has_one_token=options.seq_len == 1,
        hooks=None if strategy is None else _hooks(spec, options, layers, strategy),
    )
    recorded = tuple(kinds[layer.number] for layer in layers)
    tape.backward(_loss(tape, family.model(tape, family.config(spec), recorded, options)))
    return Program(tape, layers, family.namer(spec))


def _loss(tape: Tape, model: StepModel[Any]) -> Tensor:
    """The loss as backward begins with it: multiplied by the gradient scaler's factor where autocast is to float16."""
    loss = model.loss()
    return scale(tape, loss, "scaled loss") if tape.autocast == "float16" else loss


def _hooks(spec: ModelSpec, options: StepOptions, layers: Sequence[RecordedLayer], strategy: Strategy) -> StepHooks:
    view = model_view(spec, options)
    return strategy.hooks(view, lambda layer: view.layer_name(layers[layer].number), accumulates=options.has_gradients)


def write_forward_backward(
    timeline: TimelineBuilder, spec: ModelSpec, options: StepOptions, strategy: Strategy | None = None
) -> dict[str, int]:
    """Append the forward and backward of the last micro-step.

    Gradients that exist before are appended first, in the timeline's current phase.

    Returns:
        The ids of the gradients by parameter name, in the order of the parameters, for whoever frees them.

    Raises:
        ConfigError: The family has no step rules, or the options do not suit it.
    """
    program = record_step(spec, options, strategy=strategy)
    kept = {
        name: timeline.alloc(num_bytes, "gradients", f"{name} gradient")
        for name, num_bytes in gradient_tensors(spec, options, strategy)
        if options.has_gradients
    }
    made = program.write(timeline)
    return kept or {p.name: made[p.name] for p in spec.unique_parameters if p.name in made}


def step_memory(spec: ModelSpec, options: StepOptions, strategy: Strategy | None = None) -> StepMemory:
    """Peaks of forward and backward, quickly: those that the timeline of `write_forward_backward` replays to.

    Raises:
        ConfigError: The family has no step rules, or the options do not suit it.
    """
    use = record_step(spec, options, strategy=strategy).use()
    base = surrounding_use(spec, options, strategy)
    return StepMemory(
        forward=_sum(base, use["forward"].peak),
        backward=_sum(base, use["backward"].peak),
        after_backward=_sum(base, use["backward"].end),
        saved=sum(use["forward"].end),
    )


def _sum(base: dict[Category, int], use: tuple[int, ...]) -> dict[Category, int]:
    totals = {name: base.get(name, 0) + size for name, size in zip(CATEGORIES, use, strict=True)}
    return {name: size for name, size in totals.items() if size}
