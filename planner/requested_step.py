"""A request as the step rules take it: its options, its resident tensors, its shards, its pipeline stage."""

from __future__ import annotations

from optplan.planner.allocator.caching import ROUNDING
from optplan.planner.dtypes import ITEMSIZE_BYTES
from optplan.planner.request import StepRequest, at_stage
from optplan.planner.sharding.base import ModelView
from optplan.planner.sharding.rank import updated_parameters
from optplan.planner.sharding.report import rounded_parameters
from optplan.planner.step.rules import StepOptions, step_memory
from optplan.planner.step.view import model_view
from optplan.planner.timeline import Category
from optplan.planner.units import round_up

ASSUMED_CAPABILITY = (8, 0)
"""Compute capability whose kernels are taken where the target is no NVIDIA GPU: a budget, or one of AMD's."""


def step_options(request: StepRequest, *, batch_size: int | None = None) -> StepOptions:
    """The request as the step rules take it, with another micro-batch if one is given."""
    config = request.config
    return StepOptions(
        batch_size=batch_size or config.batch_size,
        seq_len=config.seq_len,
        precision=config.precision,
        checkpointing=config.checkpointing,
        attention=config.attention,
        grad_accum=config.grad_accum,
        fused_loss=config.fused_loss,
        step_in_backward=config.step_in_backward,
        keep_grads=config.keep_grads,
        padding_mask=config.padding_mask,
        compute_capability=request.gpu.compute_capability or ASSUMED_CAPABILITY,
        sm_count=request.gpu.sm_count,
        tensor_parallel=config.tensor_parallel,
        sequence_parallel=config.sequence_parallel,
        starts=request.pipeline_stage.starts,
        ends=request.pipeline_stage.ends,
        stored_dtype=request.policy.updated_dtype if request.strategy is not None else None,
    )


def resident_bytes(request: StepRequest) -> dict[Category, int]:
    """Rounded bytes of parameters (buffers among them) and of master weights."""
    policy, model, strategy = request.policy, request.rank_model, request.strategy
    parameters = sum(_rounded(p.numel, policy.parameter_dtype) for p in model.unique_parameters)
    buffers = sum(_rounded(b.numel, b.dtype or policy.parameter_dtype) for b in model.buffers)
    updated = updated_parameters(model.unique_parameters, strategy)
    masters = sum(_rounded(p.numel, policy.master_dtype) for p in updated if policy.master_dtype)
    if strategy is not None:
        parameters = rounded_parameters(strategy, sharded_view(request))
    resident: dict[Category, int] = {"parameters": parameters + buffers, "master_weights": masters}
    return resident | rounded_kept(request)


def rounded_kept(request: StepRequest) -> dict[Category, int]:
    """Rounded bytes of what the strategy keeps besides, such as buckets."""
    totals: dict[Category, int] = {}
    if request.strategy is not None:
        for _, num_bytes, category in request.strategy.kept(sharded_view(request)):
            totals[category] = totals.get(category, 0) + round_up(num_bytes, ROUNDING)
    return totals


def num_in_flight(request: StepRequest) -> int:
    """Micro-batches whose saved activations a rank holds at once: one, or several of a pipeline."""
    return request.pipeline_stage.num_in_flight(request.config.pipeline_schedule, request.config.grad_accum)


def largest_stage(request: StepRequest) -> int:
    """The stage of the pipeline with the largest step by rounded sums, two moments of state assumed."""
    last = request.config.pipeline_parallel - 1
    return max({0, min(1, last), last}, key=lambda stage: _quick_stage_bytes(at_stage(request, stage)))


def _quick_stage_bytes(request: StepRequest) -> int:
    memory = step_memory(request.rank_model, step_options(request), request.strategy)
    activations = max(sum(memory.forward.values()), sum(memory.backward.values()))
    activations += (num_in_flight(request) - 1) * memory.saved
    resident = resident_bytes(request)
    return activations + 3 * resident["parameters"] + resident["master_weights"]


def sharded_view(request: StepRequest) -> ModelView:
    """The request's model as its strategy sees it."""
    return model_view(request.rank_model, step_options(request))


def _rounded(numel: int, dtype: str) -> int:
    return round_up(numel * ITEMSIZE_BYTES[dtype], ROUNDING)
