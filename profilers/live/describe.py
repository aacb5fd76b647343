"""What a training loop of somebody else's trains, as far as its objects tell: model, precision, sizes, optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from optplan.planner.precision import PRECISIONS
from optplan.planner.records import ModelRow, StepConfig

_PRECISION_OF = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}
_AUTOCAST_OF = {torch.bfloat16: "amp", torch.float16: "fp16-amp"}


class OptimizerRow(NamedTuple):
    """An optimizer as a record names it.

    Attributes:
        optimizer: Id in the planner's registry, or the class's own name.
        implementation: Whose it is.
        options: What the planner would have to be told.
    """

    optimizer: str
    implementation: str
    options: dict[str, Any]


def describe_model(model: nn.Module, name: str | None) -> ModelRow:
    """The model's name, given or its configuration's or its class's, and how many elements its parameters have."""
    config = getattr(model, "config", None)
    found = name or getattr(config, "name_or_path", "") or type(model).__name__
    count = sum(parameter.numel() for parameter in model.parameters())
    return ModelRow(str(found), count, f"{type(model).__module__}.{type(model).__qualname__}")


def describe_step(
    model: nn.Module,
    *,
    inputs: Sequence[torch.Size],
    autocast: torch.dtype | None,
    num_forwards: int,
    masters: bool,
    sharding: str | None = None,
) -> StepConfig:
    """How the step is run.

    Args:
        model: Its parameters' dtype, its checkpointing and attention are read.
        inputs: Shapes of what its forward was called with; the first with two dimensions is batch x sequence.
        autocast: Dtype of autocast during the forward, None without it.
        num_forwards: Forwards of one optimizer step.
        masters: Whether the optimizer steps copies of the parameters.
        sharding: How this process's group divides the model, None where each process trains one of its own.
    """
    dtype = next(model.parameters()).dtype
    precision = _AUTOCAST_OF.get(autocast, "") if autocast and dtype == torch.float32 else ""
    precision = precision or ("mixed" if masters and dtype == torch.bfloat16 else _PRECISION_OF.get(dtype, str(dtype)))
    sized = next((shape for shape in inputs if len(shape) >= 2), torch.Size([1, 1]))
    config = getattr(model, "config", None)
    return StepConfig(
        precision=precision if precision in PRECISIONS else "fp32",
        batch_size=sized[0],
        seq_len=sized[1],
        grad_accum=max(1, num_forwards),
        checkpointing=_checkpointing(model),
        attention=str(getattr(config, "_attn_implementation", None) or "sdpa"),
        gpus=torch.distributed.get_world_size() if sharding else 1,
        sharding=sharding or "none",
    )


def _checkpointing(model: nn.Module) -> str:
    return "full" if getattr(model, "is_gradient_checkpointing", False) else "none"


def describe_optimizer(optimizer: torch.optim.Optimizer) -> OptimizerRow:
    """The planner's name of the optimizer; of a class that the planner does not know, the class's."""
    cls, defaults = type(optimizer), optimizer.defaults
    package = cls.__module__.split(".")[0]
    if package == "torch":
        return _of_torch(cls.__name__, defaults)
    if package == "optplan":
        return OptimizerRow(_OURS.get(cls.__name__, cls.__name__), "optplan", _options_of_ours(cls.__name__, defaults))
    known = _OTHERS.get((package, cls.__name__))
    return OptimizerRow(*known, {}) if known else OptimizerRow(cls.__name__, package, {})


_OURS = {"AdamW": "adamw", "AdamMini": "adam-mini", "MicroAdam": "micro-adam", "Adapprox": "adapprox"}
_OUR_OPTIONS = {
    "AdamW": ("rounding", "capturable"),
    "MicroAdam": ("window", "density", "block", "bucket", "alpha", "capturable"),
    "Adapprox": ("rank", "mode"),
}
_OTHERS = {
    ("adam_mini", "Adam_mini"): ("adam-mini", "official"),
    ("bitsandbytes", "AdamW8bit"): ("adamw-8bit", "bitsandbytes"),
    ("bitsandbytes", "PagedAdamW8bit"): ("paged-adamw-8bit", "bitsandbytes"),
    ("transformers", "Adafactor"): ("adafactor", "transformers"),
    ("ista_daslab_optimizers", "MicroAdam"): ("micro-adam", "official"),
}


def _options_of_ours(name: str, defaults: dict[str, Any]) -> dict[str, Any]:
    options = {option: defaults[option] for option in _OUR_OPTIONS.get(name, ()) if option in defaults}
    return {**options, "beta1": defaults["betas"][0]} if name == "Adapprox" else options


def _of_torch(name: str, defaults: dict[str, Any]) -> OptimizerRow:
    if name == "AdamW":
        return OptimizerRow("adamw", _implementation(defaults), {"amsgrad": bool(defaults.get("amsgrad"))})
    if name == "SGD":
        options = {key: defaults[key] for key in ("momentum", "weight_decay", "nesterov")}
        return OptimizerRow("sgd", _implementation(defaults), options)
    if name == "Adafactor":
        return OptimizerRow("adafactor", "torch", {"foreach": bool(defaults.get("foreach"))})
    return OptimizerRow(name, "torch", {})


def _implementation(defaults: dict[str, Any]) -> str:
    """Torch takes the foreach implementation on a GPU where neither is asked for."""
    if defaults.get("fused"):
        return "fused"
    return "for-loop" if defaults.get("foreach") is False else "foreach"
