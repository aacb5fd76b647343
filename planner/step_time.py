"""How long a training step takes: an analytic model with few coefficients, fitted to steps measured on an H200.

The GPU multiplies matrices at a share of the data sheet's rate, and moves what the step writes at the bandwidth of a
large copy; the links pass on what is sharded meanwhile; the optimizer's step follows. The host launches the same work
call by call and runs ahead as far as it can, into the next step too: over whole steps the longer of GPU and host
decides. Where forward reads a value off the GPU, as transformers' causal masks do, the host runs ahead no further than
that: each micro-step begins when all before it is done. Other GPUs are scaled by their data sheets and keep the
measured host: their times are marked `scaled`.

Source: `data/step_time.toml`; `benchmarks/fit_step_time.py` fits the coefficients and states the errors.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Literal

import msgspec

from optplan.planner.candidates import Candidate
from optplan.planner.dtypes import ITEMSIZE_BYTES
from optplan.planner.gpus import Gpu, load_gpu
from optplan.planner.host_work import HostCalls
from optplan.planner.models.spec import ModelSpec
from optplan.planner.request import StepRequest
from optplan.planner.sharding.registry import FULL_SHARDINGS
from optplan.planner.step_time_links import is_reduced_once, link_seconds, reduction_of
from optplan.planner.step_time_rates import CALIBRATED_GPU, HostRates, OptimizerRates, TimeModel
from optplan.planner.step_time_work import PhaseWork, StepWork

Basis = Literal["calibrated", "scaled"]
Bound = Literal["gpu", "host", "link"]
_MOVES_PER_COPIED_BYTE = 2.0
"""A copy is read once and written once."""
_MOVES_PER_ADDED_BYTE = 3.0
"""Two gradients are read and their sum is written."""
_FOLLOWED = 8
"""Micro-steps that are followed one by one to tell forward from backward; further ones are like them."""
_EXTRA_MASTER_BYTES = 12
"""Moved a parameter with master weights: a bf16 gradient is read and written in fp32, the result read and cast."""


class Busy(msgspec.Struct, frozen=True):
    """Seconds that the GPU, the host and the links to other GPUs are busy with one part of the step."""

    gpu: float
    host: float
    link: float = 0.0

    def plus(self, other: Busy) -> Busy:
        """Both one after the other."""
        return Busy(self.gpu + other.gpu, self.host + other.host, self.link + other.link)

    def times(self, count: float) -> Busy:
        """The same several times."""
        return Busy(self.gpu * count, self.host * count, self.link * count)


class MicroSteps(msgspec.Struct, frozen=True):
    """Forward and backward of all micro-steps.

    Attributes:
        forward: Of one of them; likewise `backward`.
        count: How many there are.
        reduction: Of gradients that are reduced once a step, beside the last backward.
        accumulation: Of gradients that are added to those of the micro-steps before, in each but the first.
        waits: Whether in each forward the host waits for all that it launched before.
    """

    forward: Busy
    backward: Busy
    count: int = 1
    reduction: Busy = Busy(0.0, 0.0)
    accumulation: Busy = Busy(0.0, 0.0)
    waits: bool = False

    @property
    def busy(self) -> Busy:
        """All of them."""
        once = self.reduction.plus(self.accumulation.times(self.count - 1))
        return self.forward.plus(self.backward).times(self.count).plus(once)

    def device_seconds(self, exponent: float) -> float:
        """How long they take on the GPU and its links, which work at the same time."""
        one = _without_host(self.forward.plus(self.backward))
        added = (self.count - 1) * self.accumulation.gpu
        if not self.reduction.link and not self.reduction.gpu:
            return self.count * longer(one, exponent) + added
        last = one.plus(_without_host(self.reduction))
        return (self.count - 1) * longer(one, exponent) + longer(last, exponent) + added

    @property
    def host_seconds(self) -> float:
        """How long the host takes to launch them."""
        return self.busy.host


class Update(msgspec.Struct, frozen=True):
    """The optimizer's step, and the seconds in which what it updated is gathered after it."""

    busy: Busy
    gather: float = 0.0

    @property
    def device_seconds(self) -> float:
        """How long both take on the GPU and its links."""
        return self.busy.gpu + self.gather


class StepSeconds(msgspec.Struct, frozen=True):
    """Time of one step in seconds.

    Attributes:
        step: The whole step, all its micro-steps.
        forward: All forwards; likewise `backward`, with what is computed again and reduced.
        optimizer: The optimizer's step.
        bound: What decides: the GPU's work, the host's launches or the links to other GPUs.
    """

    step: float
    forward: float
    backward: float
    optimizer: float
    bound: Bound

    def as_dict(self) -> dict[str, float]:
        """The form of an estimate's `step_seconds`."""
        return {"step": self.step, "forward": self.forward, "backward": self.backward, "optimizer": self.optimizer}


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
    rates, host, bandwidth = model.gpu, model.host, gpu.achievable_bandwidth_bytes_per_s or 0.0
    peak, share = _product_peak(gpu, precision, model=model)
    seconds = work.product_flops / (share * peak) + work.attention_flops / (rates.attention_share * peak)
    moved = rates.moves_per_written_byte * work.written_bytes + _MOVES_PER_COPIED_BYTE * work.copied_bytes
    seconds += moved / bandwidth + rates.seconds_per_launch * work.num_launches
    return Busy(seconds, host_seconds(work.calls, host) + host.seconds_per_collective * work.num_collectives)


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


def combine(micro: MicroSteps, update: Update, *, exponent: float) -> StepSeconds:
    """The time of a step: its micro-steps, then the optimizer's, as one step follows another."""
    step = step_length(micro, update, exponent=exponent)
    few = msgspec.structs.replace(micro, count=min(micro.count, _FOLLOWED))
    ends = phase_ends(few, update, num_steps=2, exponent=exponent)
    spans = [end - begin for begin, end in pairwise(ends[2 * few.count :])]
    forward, backward = (sum(spans[first:-1:2]) * micro.count / few.count for first in (0, 1))
    share = step / (forward + backward + spans[-1])
    busy = micro.busy.plus(update.busy).plus(Busy(0.0, 0.0, update.gather))
    return StepSeconds(step, share * forward, share * backward, share * spans[-1], _bound(busy))


class BeforeUpdate(msgspec.Struct, frozen=True):
    """What of a step passes before its optimizer's.

    Attributes:
        seconds: Until GPU and host last waited for each other; zero where they never do.
        device: Since then, on the GPU and its links; likewise `host`.
    """

    seconds: float
    device: float
    host: float

    def step_seconds(self, update: Update, *, exponent: float) -> float:
        """From the end of one step to the end of the next."""
        device, host = self.device + update.device_seconds, self.host + update.busy.host
        return self.seconds + whole_step(device, host, exponent)


def before_update(micro: MicroSteps, *, exponent: float) -> BeforeUpdate:
    """How long forward and backward of all micro-steps take, whatever optimizer follows."""
    if not micro.waits:
        return BeforeUpdate(0.0, micro.device_seconds(exponent), micro.host_seconds)
    few = msgspec.structs.replace(micro, count=min(micro.count, 3))
    ends = [0.0, *phase_ends(few, Update(Busy(0.0, 0.0)), num_steps=1, exponent=exponent)]
    begin, end = ends[2 * few.count - 2], ends[2 * few.count]
    others = (micro.count - few.count) * (ends[4] - ends[2]) if micro.count > few.count else 0.0
    host = micro.forward.host + micro.backward.host + micro.reduction.host
    return BeforeUpdate(begin + others, end - begin, host + (micro.accumulation.host if micro.count > 1 else 0.0))


def step_length(micro: MicroSteps, update: Update, *, exponent: float) -> float:
    """Seconds from the end of one step to the end of the next."""
    return before_update(micro, exponent=exponent).step_seconds(update, exponent=exponent)


def phase_ends(micro: MicroSteps, update: Update, *, num_steps: int, exponent: float) -> list[float]:
    """When the GPU is done with every forward, every backward and the optimizer's step of each of some steps.

    GPU and host begin the first of them together, and the host goes on to the next without waiting, or to the next
    forward.
    """
    parts = []
    for index in range(micro.count):
        backward = micro.backward.plus(micro.accumulation) if index else micro.backward
        backward = backward.plus(micro.reduction) if index == micro.count - 1 else backward
        parts += [(longer(_without_host(one), exponent), one.host) for one in (micro.forward, backward)]
    parts.append((update.device_seconds, update.busy.host))
    ends, together, launched = [0.0], 0.0, 0.0
    for index, (seconds, host) in enumerate(parts * num_steps):
        if micro.waits and index % len(parts) in range(0, 2 * micro.count, 2):
            together, launched = ends[-1], 0.0
        launched += host
        ends.append(together + whole_step(ends[-1] - together + seconds, launched, exponent))
    return ends[1:]


def whole_step(device: float, host: float, exponent: float) -> float:
    """Seconds of a step that keeps the GPU with its links and the host busy for so long, each without a break."""
    return longer(Busy(device, host), exponent)


def _without_host(busy: Busy) -> Busy:
    return Busy(busy.gpu, 0.0, busy.link)


def _bound(whole: Busy) -> Bound:
    most = max(whole.gpu, whole.host, whole.link)
    return "gpu" if whole.gpu == most else "host" if whole.host == most else "link"


def longer(busy: Busy, exponent: float) -> float:
    """The longest of the three, a little more where two are alike."""
    most = max(busy.gpu, busy.host, busy.link)
    total = (busy.gpu / most) ** exponent + (busy.host / most) ** exponent
    if busy.link:
        total += (busy.link / most) ** exponent
    return float(most * total ** (1 / exponent))
