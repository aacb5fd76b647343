"""One rank's part of an optimizer: the parameters it updates, the state it keeps for them, what its step allocates."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from optplan.planner.dtypes import Dtype
from optplan.planner.footprint import Footprint, ParameterState, group_parameters, optimizer_footprint
from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel
from optplan.planner.sharding.base import Strategy
from optplan.planner.sharding.optimizer_state import check_takes_shards, shard_state
from optplan.planner.sharding.optimizer_steps import write_sharded_step
from optplan.planner.step.optimizer_step import write_optimizer_step
from optplan.planner.tensors import Parameter, StateTensor
from optplan.planner.timeline import TimelineBuilder


def updated_parameters(parameters: Sequence[Parameter], strategy: Strategy | None) -> Sequence[Parameter]:
    """Those of a model's parameters that this rank's optimizer has, whole or by their rows."""
    return parameters if strategy is None else strategy.updated(parameters)


def rank_footprint(
    optimizer: OptimizerModel,
    parameters: Sequence[Parameter],
    context: OptimizerContext,
    strategy: Strategy | None,
) -> Footprint:
    """The state that one rank keeps.

    Args:
        optimizer: Bound to the model.
        parameters: The model's, tied aliases left out.
        context: The dtypes that the optimizer meets.
        strategy: How the work is divided, if it is.

    Raises:
        ConfigError: The optimizer's work on a part of a tensor is not described, or it cannot keep the state dtype.
    """
    updated = updated_parameters(parameters, strategy)
    if strategy is None:
        return optimizer_footprint(optimizer, updated, context)
    shard = strategy.shard()
    if shard is not None or strategy.flattens:
        check_takes_shards(optimizer, flag=f"--sharding {strategy.name}", flat=strategy.flattens)
    if shard is None:
        return optimizer_footprint(optimizer, updated, context)
    groups = tuple(
        ParameterState(pattern, members, shard_state(optimizer, members[0], context, shard))
        for pattern, members in group_parameters(updated)
    )
    shared = optimizer.shared_state([shard.local(parameter) for parameter in updated], context)
    footprint = Footprint(groups, shared)
    return _on_host(footprint) if strategy.offloads else footprint


def _on_host(footprint: Footprint) -> Footprint:
    """The same state in host memory."""
    groups = tuple(
        msgspec.structs.replace(group, tensors=tuple(map(_host_tensor, group.tensors))) for group in footprint.groups
    )
    return Footprint(groups, tuple(map(_host_tensor, footprint.shared)))


def _host_tensor(tensor: StateTensor) -> StateTensor:
    return msgspec.structs.replace(tensor, device="cpu")


def write_rank_step(
    timeline: TimelineBuilder,
    optimizer: OptimizerModel,
    parameters: Sequence[Parameter],
    context: OptimizerContext,
    *,
    master: Dtype | None,
    strategy: Strategy | None,
) -> None:
    """Append the allocations and frees of one steady `step()` on this rank.

    Args:
        timeline: Where to append.
        optimizer: Bound to the model.
        parameters: Those that this rank's optimizer has, whole.
        context: The dtypes that the optimizer meets.
        master: Dtype of the master weights, if the optimizer updates those.
        strategy: How the work is divided, if it is.
    """
    shard = None if strategy is None else strategy.shard()
    if shard is None:
        write_optimizer_step(timeline, optimizer, parameters, context, master=master)
    elif strategy is not None and not strategy.offloads:
        write_sharded_step(timeline, optimizer, parameters, context, shard)
