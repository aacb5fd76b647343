"""What an optimizer allocates in its steps: traced where its class runs without contents, else as the planner says.

Traced are the optimizers of torch and transformers whose step depends on no value. The others, our Triton ones among
them, are taken from the planner, whose models are held against their real steps on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import torch

from optplan.planner.dtypes import Dtype
from optplan.planner.footprint import optimizer_footprint
from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel
from optplan.planner.step.optimizer_step import write_optimizer_step
from optplan.planner.tensors import Parameter
from optplan.planner.timeline import TimelineBuilder
from optplan.profilers.tracing.runs import OptimizerPart

Factory = Callable[[Sequence[torch.nn.Parameter]], torch.optim.Optimizer]
"""Makes an optimizer for parameters."""

_IMPLEMENTATIONS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "for-loop": {"foreach": False}}


def optimizer_factory(model: OptimizerModel) -> Factory | None:
    """What makes the real optimizer, None where it has to be modelled."""
    build = _FACTORIES.get(model.id)
    return build(model) if build is not None else None


def _adamw(model: OptimizerModel) -> Factory | None:
    if model.implementation not in _IMPLEMENTATIONS:
        return None
    flags = {**_IMPLEMENTATIONS[model.implementation], **_taken(model.options, "amsgrad", "weight_decay")}
    return lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, **flags)


def _sgd(model: OptimizerModel) -> Factory | None:
    flags = {
        **_IMPLEMENTATIONS[model.implementation],
        **_taken(model.options, "momentum", "weight_decay", "nesterov"),
    }
    return lambda parameters: torch.optim.SGD(parameters, lr=1e-3, **flags)


def _taken(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: options[name] for name in names if name in options}


_FACTORIES: dict[str, Callable[[OptimizerModel], Factory | None]] = {"adamw": _adamw, "sgd": _sgd}


def modelled_part(
    model: OptimizerModel,
    parameters: Sequence[Parameter],
    context: OptimizerContext,
    *,
    master: Dtype | None = None,
) -> OptimizerPart:
    """The optimizer's steps as the planner describes them.

    Args:
        model: Bound to the parameters.
        parameters: The model's parameters, tied aliases left out.
        context: The dtypes that the optimizer meets.
        master: Dtype of the master weights that the optimizer updates instead, None without them.
    """
    first, steady = TimelineBuilder("step"), TimelineBuilder("step")
    footprint = optimizer_footprint(model, parameters, context)
    for num_bytes in footprint.device_sizes(parameters):
        first.alloc(num_bytes, "optimizer_state", f"{model.id} state")
    for timeline in (first, steady):
        write_optimizer_step(timeline, model, parameters, context, master=master)
    # Each builder counts from 1: the later step's ids must not be those of the state that it finds.
    later = [msgspec.structs.replace(event, id=event.id + len(first.events)) for event in steady.events]
    return OptimizerPart.of(first.events, later).apart()
