"""What a report says of several GPUs beside the figures of the rank it shows."""

from __future__ import annotations

from optplan.planner.allocator.caching import ROUNDING
from optplan.planner.dtypes import ITEMSIZE_BYTES
from optplan.planner.request import StepRequest
from optplan.planner.sharding.base import ModelView, Strategy
from optplan.planner.sharding.ddp import Ddp
from optplan.planner.sharding.fsdp2 import Fsdp2
from optplan.planner.sharding.zero1 import Zero1, partition
from optplan.planner.units import format_gib, round_up


def resident_sizes(strategy: Strategy, view: ModelView) -> tuple[int, int]:
    """Unrounded bytes of what stands for the parameters and of the gradients."""
    kept = sum(num_bytes for _, num_bytes, category in strategy.kept(view) if category == "gradients")
    gradients = kept + sum(num_bytes for _, num_bytes in strategy.gradients(view))
    return sum(num_bytes for _, num_bytes in strategy.parameters(view)), gradients


def rounded_parameters(strategy: Strategy, view: ModelView) -> int:
    """Bytes of what stands for the parameters, each rounded up as the allocator does."""
    return sum(round_up(num_bytes, ROUNDING) for _, num_bytes in strategy.parameters(view))


def rank_notes(request: StepRequest) -> list[str]:
    """Which rank is shown and which is the largest, and what a step before the steady ones needs more."""
    strategy, config = request.strategy, request.config
    notes = []
    if config.pipeline_parallel > 1:
        notes.append(
            f"stage {request.stage} of 0 to {config.pipeline_parallel - 1} is shown, the largest: it holds what "
            f"{_num_in_flight(request)} micro-batches saved"
        )
    if strategy is not None:
        notes.append(_largest(request, strategy))
    if isinstance(strategy, Fsdp2) and config.grad_accum > 1:
        notes.append(_unreduced(request))
    if isinstance(strategy, Ddp):
        size = sum(parameter.numel for parameter in request.rank_model.unique_parameters)
        size *= 4 if request.policy.parameter_dtype == "float32" else 2
        notes.append(
            f"the second step may need {format_gib(size)} more, which then stay reserved: DDP makes its buckets anew "
            "while the communication library may still hold the first one"
        )
    return notes


def _unreduced(request: StepRequest) -> str:
    """What waiting with the reduction would take: whole gradients, in the dtype in which they are reduced.

    Source: torch `_fsdp_param.py` (`to_accumulated_grad_if_needed`); accelerate `accelerator.py` (`no_sync`).
    """
    size = sum(parameter.numel for parameter in request.rank_model.unique_parameters)
    size *= ITEMSIZE_BYTES[request.policy.gradient_dtype]
    whole = f"they are kept whole, {format_gib(size)} in place of the shards"
    return (
        "every micro-batch's gradients are reduced, as torch does by itself; where that waits for the last one "
        f"(accelerate, set_requires_gradient_sync(False)) {whole}"
    )


def _num_in_flight(request: StepRequest) -> int:
    return request.pipeline_stage.num_in_flight(request.config.pipeline_schedule, request.config.grad_accum)


def _largest(request: StepRequest, strategy: Strategy) -> str:
    if not isinstance(strategy, Zero1):
        return "rank 0 is shown; no rank needs more"
    shares = partition(request.rank_model.unique_parameters, strategy.ranks.num_gpus)
    sizes = [sum(parameter.numel for parameter in share) for share in shares]
    largest = sizes.index(max(sizes))
    if largest == 0:
        return "rank 0 is shown, whose optimizer has the most parameters"
    return (
        f"rank 0 is shown, whose optimizer has {sizes[0]:,} parameters; rank {largest} has the most, {sizes[largest]:,}"
    )
