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
from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel
from optplan.planner.sharding.base import Strategy
from optplan.planner.sharding.optimizer_state import kept_beside_state
from optplan.planner.sharding.rank import rank_footprint, updated_parameters, write_rank_step
from optplan.planner.tensors import Parameter
from optplan.planner.timeline import Timeline, TimelineBuilder
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
    strategy: Strategy | None = None,
) -> OptimizerPart:
    """The optimizer's steps as the planner describes them.

    Args:
        model: Bound to the parameters.
        parameters: The model's parameters, tied aliases left out.
        context: The dtypes that the optimizer meets.
        master: Dtype of the master weights that the optimizer updates instead, None without them.
        strategy: How the parameters are divided among ranks, if they are.
    """
    state, steady = TimelineBuilder("step"), TimelineBuilder("step")
    footprint = rank_footprint(model, parameters, context, strategy)
    parameters = updated_parameters(parameters, strategy)
    for num_bytes in footprint.device_sizes(parameters):
        state.alloc(num_bytes, "optimizer_state", f"{model.id} state")
    for name, num_bytes in kept_beside_state(model, parameters, None if strategy is None else strategy.shard()):
        state.alloc(num_bytes, "optimizer_state", name)
    write_rank_step(steady, model, parameters, context, master=master, strategy=strategy)
    # Each builder counts from 1: the ids of the steps must not be those of the state that they find.
    first, later = (_moved(steady.events, len(state.events) + number * len(steady.events)) for number in (0, 1))
    copies = len(parameters) if master else 0
    return OptimizerPart.of([*first[:copies], *state.events, *first[copies:]], later).apart()


def _moved(timeline: Timeline, offset: int) -> Timeline:
    """The same events with ids that begin after `offset`."""
    return [msgspec.structs.replace(event, id=event.id + offset) for event in timeline]
