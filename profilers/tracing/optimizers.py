"""What an optimizer allocates in its steps: traced where its class runs without contents, else as the planner says.

Traced are the optimizers of torch and transformers whose step depends on no value. The others, our Triton ones among
them, are taken from the planner, whose models are held against their real steps on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import torch

from optplan.planner.footprint import optimizer_footprint
from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel
from optplan.planner.tensors import Parameter
from optplan.planner.timeline import Timeline, TimelineBuilder
from optplan.profilers.tracing.runs import OptimizerPart

Factory = Callable[[Sequence[torch.nn.Parameter]], torch.optim.Optimizer]
"""Makes an optimizer for parameters."""

_FIRST_MODELLED_ID = 1 << 40

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
    model: OptimizerModel, parameters: Sequence[Parameter], context: OptimizerContext
) -> OptimizerPart:
    """The optimizer's steps as the planner describes them.

    Args:
        model: Bound to the parameters.
        parameters: The model's parameters, tied aliases left out.
        context: The dtypes that the optimizer meets.
    """
    first, steady = TimelineBuilder("step"), TimelineBuilder("step")
    footprint = optimizer_footprint(model, parameters, context)
    for num_bytes in footprint.device_sizes(parameters):
        first.alloc(num_bytes, "optimizer_state", f"{model.id} state")
    model.write_step(first, parameters, context)
    model.write_step(steady, parameters, context)
    return OptimizerPart(_renumbered(first.events), _renumbered(steady.events))


def _renumbered(timeline: Timeline) -> Timeline:
    """The events with ids that no traced allocation has."""
    return [msgspec.structs.replace(event, id=event.id + _FIRST_MODELLED_ID) for event in timeline]
