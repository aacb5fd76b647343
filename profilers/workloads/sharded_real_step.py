"""A catalogue model divided among the processes of a group, and one rank's training step."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from optplan.planner.dtypes import Dtype
from optplan.planner.errors import ConfigError
from optplan.planner.models.spec import ModelSpec
from optplan.planner.optimizers.base import OptimizerModel
from optplan.planner.records import StepConfig
from optplan.profilers.workloads.real_optimizers import build_optimizer
from optplan.profilers.workloads.real_step import (
    RealStep,
    Step,
    build_real_model,
    make_inputs,
    master_weights,
)
from optplan.profilers.workloads.sharded_modules import FULLY_SHARDED, fully_shard_module

_Optimize = Callable[[nn.Module, Any], torch.optim.Optimizer]


def build_sharded_step(
    spec: ModelSpec,
    config: StepConfig,
    description: OptimizerModel,
    device: torch.device,
    *,
    state_dtype: Dtype | None = None,
) -> RealStep:
    """Build this rank's part of the model, its own inputs, and its optimizer; the process group is there.

    Raises:
        ConfigError: The model or the optimizer cannot be run here, or not on a part.
    """
    if config.sharding == "zero1" and description.id == "adam-mini":
        raise ConfigError(
            "adam-mini reads its partition from the whole model and cannot be one rank's part of "
            "ZeroRedundancyOptimizer; use --sharding ddp or fsdp2"
        )
    build = _fully_sharded if config.sharding in FULLY_SHARDED else _replicated
    return build(spec, config, partial(build_optimizer, description, spec=spec, state_dtype=state_dtype), device)


def _fully_sharded(spec: ModelSpec, config: StepConfig, optimize: _Optimize, device: torch.device) -> RealStep:
    mixed = config.precision == "mixed"
    divide = partial(
        fully_shard_module,
        mesh=init_device_mesh(device.type, (dist.get_world_size(),)),
        reshards=FULLY_SHARDED[config.sharding],
        mixed=mixed,
        before_each=partial(_place_parameters, device=device),
        # It leaves cycles that keep the undivided parameters alive.
        after_each=gc.collect,
    )
    model = build_real_model(spec, config, device, dtype=torch.float32 if mixed else None, place=divide)
    # The list is made before the first forward: later the root's parameters are the gathered ones.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimize(model, trained)
    step = Step(model, optimizer, trained, [], _own_inputs(model, config, device), config)
    return RealStep(model, optimizer, step.take)


def _place_parameters(module: nn.Module, *, device: torch.device) -> None:
    """Memory on the device for the parameters that are not there yet, as FSDP2 would give them, but nothing copied."""
    for parameter in module.parameters():
        if parameter.device != device:
            parameter.data = torch.empty_like(parameter, device=device)


def _replicated(spec: ModelSpec, config: StepConfig, optimize: _Optimize, device: torch.device) -> RealStep:
    model = build_real_model(spec, config, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wrapped = nn.parallel.DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=config.sharding != "ddp-copies",
    )
    masters = master_weights(trained, config)
    inputs = _own_inputs(model, config, device)
    if config.sharding == "zero1":
        whole = _zero1(partial(optimize, model), trained)
        # The rank's own optimizer has the state; its step is within the whole one's.
        return RealStep(wrapped, whole.optim, Step(wrapped, whole, trained, [], inputs, config).take)
    optimizer = optimize(model, masters or trained)
    return RealStep(wrapped, optimizer, Step(wrapped, optimizer, trained, masters, inputs, config).take)


def _zero1(optimize: Callable[[Any], torch.optim.Optimizer], trained: list[nn.Parameter]) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    # It calls the class with this rank's groups; anything that makes an optimizer of them will do.
    make: Any = lambda groups, **_: optimize(groups)  # noqa: E731
    return ZeroRedundancyOptimizer(trained, optimizer_class=make)


def _own_inputs(model: Any, config: StepConfig, device: torch.device) -> dict[str, torch.Tensor]:
    """Every rank draws its own."""
    torch.manual_seed(1 + dist.get_rank())
    return make_inputs(model, config, device)
