"""How long a training step takes: an analytic model with few coefficients, fitted to steps measured on an H200.

The GPU multiplies matrices at a share of the data sheet's rate, and moves what the step writes at the bandwidth of a
large copy; the links pass on what is sharded meanwhile; the optimizer's step follows. The host launches the same work
call by call; `step_time_overlap` says what of all this goes on at the same time. Other GPUs are scaled by their data
sheets and keep the measured host: their times are marked `scaled`.

Source: `data/step_time.toml`; `benchmarks/fit_step_time.py` fits the coefficients and states the errors.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

from optplan.planner.candidates import Candidate
from optplan.planner.dtypes import ITEMSIZE_BYTES
from optplan.planner.gpus import Gpu, load_gpu
from optplan.planner.host_work import HostCalls
from optplan.planner.models.spec import ModelSpec
from optplan.planner.request import StepRequest
from optplan.planner.sharding.registry import FULL_SHARDINGS
from optplan.planner.step_time_links import is_reduced_once, link_seconds, reduction_of
from optplan.planner.step_time_overlap import Busy, MicroSteps, Update
from optplan.planner.step_time_rates import CALIBRATED_GPU, HostRates, OptimizerRates, TimeModel
from optplan.planner.step_time_work import HeadWork, PhaseWork, StepWork

Basis = Literal["calibrated", "scaled"]
_MOVES_PER_COPIED_BYTE = 2.0
"""A copy is read once and written once."""
_MOVES_PER_ADDED_BYTE = 3.0
"""Two gradients are read and their sum is written."""
_EXTRA_MASTER_BYTES = 12
"""Moved a parameter with master weights: a bf16 gradient is read and written in fp32, the result read and cast."""


def timed_gpu(gpu: Gpu) -> Gpu | None:
    """The GPU if its rates are known, None for a memory budget."""
    return gpu if gpu.peak_flops and gpu.achievable_bandwidth_bytes_per_s else None


def is_timed(request: StepRequest) -> bool:
    """Whether the model describes how a request's GPUs share the work: not if they share layers or stages."""
    config = request.config
    shares_layers = config.tensor_parallel > 1 or config.pipeline_parallel > 1
    return not shares_layers and config.sharding != "fsdp2-offload"


def basis_of(gpu: Gpu) -> Basis:
    """Whether times on this GPU are fitted to measurements there or scaled from another's."""
    return "calibrated" if gpu.id == CALIBRATED_GPU else "scaled"


def micro_steps(work: StepWork, request: StepRequest, gpu: Gpu, *, model: TimeModel) -> MicroSteps:
    """How long forward and backward keep GPU, host and links busy."""
    precision, links = request.config.precision, link_seconds(request, model=model)
    forward = phase_busy(work.forward, gpu, precision, model=model)
    backward = phase_busy(work.backward, gpu, precision, model=model)
    reduced, once = _reducing(request, gpu, model=model), is_reduced_once(request)
    return MicroSteps(
        forward.plus(Busy(0.0, 0.0, links.forward)),
        backward.plus(Busy(0.0, 0.0, links.backward)).plus(Busy(0.0, 0.0) if once else reduced),
        request.config.grad_accum,
        Busy(0.0, 0.0, links.reduction).plus(reduced if once else Busy(0.0, 0.0)),
        _accumulating(request, gpu, model=model),
        work.forward.calls.waits > 0,
        kernel_seconds(work.forward.head, gpu, precision, model=model),
        kernel_seconds(work.backward.head, gpu, precision, model=model),
    )


def _accumulating(request: StepRequest, gpu: Gpu, *, model: TimeModel) -> Busy:
    """What adding the gradients of one micro-step to those before takes."""
    spec, itemsize = request.model, ITEMSIZE_BYTES[request.policy.gradient_dtype]
    is_divided = request.config.sharding in (*FULL_SHARDINGS, "zero2")
    held = _updated_share(request) if is_divided else 1.0
    moved = _MOVES_PER_ADDED_BYTE * held * itemsize * spec.num_parameters
    launching = model.host.seconds_per_launch * len(spec.trained_parameters)
    return Busy(moved / (gpu.achievable_bandwidth_bytes_per_s or 1.0), launching)


def _reducing(request: StepRequest, gpu: Gpu, *, model: TimeModel) -> Busy:
    """What gradients that are reduced one by one take besides the links."""
    reduction, bandwidth = reduction_of(request), gpu.achievable_bandwidth_bytes_per_s or 0.0
    copying = _MOVES_PER_COPIED_BYTE * reduction.copied_bytes / bandwidth
    return Busy(copying, model.host.seconds_per_reduced_tensor * reduction.num_tensors)


def phase_busy(work: PhaseWork, gpu: Gpu, precision: str, *, model: TimeModel) -> Busy:
    """How long one phase of one micro-step keeps GPU and host busy."""
    rates, host = model.gpu, model.host
    peak, _ = _product_peak(gpu, precision, model=model)
    whole = HeadWork(work.product_flops, work.written_bytes, work.num_launches)
    seconds = kernel_seconds(whole, gpu, precision, model=model) + work.attention_flops / (rates.attention_share * peak)
    seconds += _MOVES_PER_COPIED_BYTE * work.copied_bytes / (gpu.achievable_bandwidth_bytes_per_s or 0.0)
    return Busy(seconds, host_seconds(work.calls, host) + host.seconds_per_collective * work.num_collectives)


def kernel_seconds(work: HeadWork, gpu: Gpu, precision: str, *, model: TimeModel) -> float:
    """How long products, written tensors and launches keep the GPU busy."""
    peak, share = _product_peak(gpu, precision, model=model)
    moved = model.gpu.moves_per_written_byte * work.written_bytes / (gpu.achievable_bandwidth_bytes_per_s or 0.0)
    return work.product_flops / (share * peak) + moved + model.gpu.seconds_per_launch * work.num_launches


def host_seconds(calls: HostCalls, host: HostRates) -> float:
    """How long the host takes for what is asked of it."""
    return (
        host.seconds_per_call * (calls.calls + calls.modules)
        + host.seconds_per_launch * (calls.launches + calls.nodes + calls.backward_launches)
        + host.seconds_per_hook * calls.kept
    )


def _product_peak(gpu: Gpu, precision: str, *, model: TimeModel) -> tuple[float, float]:
    """Operations per second of products under one precision by the data sheet, and the share of it reached."""
    dtype = {"fp32": "fp32", "fp16-amp": "fp16"}.get(precision, "bf16")
    if dtype == "fp32" or dtype not in gpu.peak_flops:
        return gpu.peak_flops["fp32"], model.gpu.product_share_fp32
    return gpu.peak_flops[dtype], model.gpu.product_share_16bit


def optimizer_update(
    candidate: Candidate, moved_bytes: int, gpu: Gpu, request: StepRequest, *, model: TimeModel
) -> Update:
    """How long the optimizer's step keeps GPU and host busy, and what follows it.

    Args:
        candidate: The optimizer, bound to the model.
        moved_bytes: Bytes that it must read and write.
        gpu: Where it runs.
        request: The step; with master weights their casts are counted.
        model: The coefficients.
    """
    rates = model.rates_of(candidate.id, candidate.implementation)
    spec, bandwidth = request.model, gpu.achievable_bandwidth_bytes_per_s or 0.0
    share = _updated_share(request)
    extra = _EXTRA_MASTER_BYTES * spec.num_parameters * share if request.policy.master_dtype else 0
    seconds = (moved_bytes + extra) / bandwidth
    seconds += _slower(gpu) * rates.seconds_per_element * spec.num_parameters * share
    peak, product_share = _product_peak(gpu, "bf16", model=model)
    seconds += share * _product_flops(candidate, rates, spec) / (product_share * peak)
    if candidate.footprint.host_bytes and candidate.id.startswith("paged"):
        seconds += 2 * candidate.footprint.host_bytes / (gpu.host_link_bytes_per_s or 1e10)
    return Update(Busy(seconds, _launching(rates, spec)), link_seconds(request, model=model).gather)


def _launching(rates: OptimizerRates, spec: ModelSpec) -> float:
    """How long the host takes to launch the optimizer's step."""
    num_matrices = sum(len(parameter.shape) > 1 for parameter in spec.unique_parameters)
    return rates.seconds_per_tensor * len(spec.unique_parameters) + rates.seconds_per_matrix * num_matrices


def _updated_share(request: StepRequest) -> float:
    """Share of the model's elements that one rank's optimizer updates."""
    config = request.config
    if config.sharding in ("none", "ddp", "ddp-copies"):
        return 1.0
    return config.nodes / config.gpus if config.sharding == "fsdp2-hybrid" else 1.0 / config.gpus


@cache
def _bandwidth_of_calibration() -> float:
    return load_gpu(CALIBRATED_GPU).achievable_bandwidth_bytes_per_s or 0.0


def _slower(gpu: Gpu) -> float:
    """How much longer arithmetic on elements takes: in proportion to the bandwidth, as GPUs are balanced."""
    return _bandwidth_of_calibration() / (gpu.achievable_bandwidth_bytes_per_s or 1.0)


def _product_flops(candidate: Candidate, rates: OptimizerRates, spec: ModelSpec) -> float:
    """Operations of an optimizer that multiplies matrices itself."""
    if not rates.flops_per_element_and_rank and not rates.flops_per_element_and_side:
        return 0.0
    rank = candidate.options.get("rank")
    total = 0.0
    for parameter in spec.unique_parameters:
        if len(parameter.shape) == 2:
            side = min(parameter.shape)
            used = min(side // 4, rank) if isinstance(rank, int) else side // 4
            per_element = rates.flops_per_element_and_rank * used + rates.flops_per_element_and_side * side
            total += per_element * parameter.numel
    return total
