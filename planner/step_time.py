"""How long a training step takes: an analytic model with few coefficients, fitted to steps measured on an H200.

The GPU multiplies matrices at a share of the data sheet's rate, and moves what the step writes at the bandwidth of a
large copy; the host launches the same work layer by layer. Both run at the same time, and the longer decides. Other
GPUs are scaled by their data sheets and keep the measured host: their times are marked `scaled`.

Source: `data/step_time.toml`; `benchmarks/fit_step_time.py` fits the coefficients and states the errors.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Literal

import msgspec

from optplan.planner.candidates import Candidate
from optplan.planner.errors import DataError
from optplan.planner.gpus import Gpu, load_gpu
from optplan.planner.models.spec import ModelSpec
from optplan.planner.request import StepRequest
from optplan.planner.step_time_links import link_bytes_per_s, link_traffic
from optplan.planner.step_time_work import PhaseWork, StepWork

Basis = Literal["calibrated", "scaled"]
Bound = Literal["gpu", "host", "link"]
CALIBRATED_GPU = "h200-141g"
LARGEST_ERROR = 0.17
"""Largest error of the model on the steps it was fitted to; the held-out halves reach 27 %."""
_EXTRA_MASTER_BYTES = 12
"""Moved a parameter with master weights: a bf16 gradient is read and written in fp32, the result read and cast."""


class GpuRates(msgspec.Struct, frozen=True):
    """Shares of the data sheet that a GPU reaches."""

    product_share_16bit: float
    product_share_fp32: float
    attention_share: float
    moves_per_written_byte: float


class HostRates(msgspec.Struct, frozen=True):
    """Seconds that a micro-step takes to launch; the layers' figures cover forward and backward."""

    seconds_per_rotary_layer: float
    seconds_per_other_layer: float
    seconds_per_recomputed_layer: float
    seconds_per_tensor: float


class OptimizerRates(msgspec.Struct, frozen=True):
    """Time of `step()` besides moving its bytes at the copy bandwidth."""

    id: str
    implementation: str
    seconds_per_element: float
    seconds_per_tensor: float
    basis: Literal["measured", "estimated"]
    source: str
    flops_per_element_and_rank: float = 0.0
    flops_per_element_and_side: float = 0.0


class Overlap(msgspec.Struct, frozen=True):
    """How sharply the longest of GPU, host and links decides."""

    exponent: float


class LinkRates(msgspec.Struct, frozen=True):
    """Share of a link's bandwidth that collectives reach; `basis` says what it rests on."""

    bandwidth_share: float
    basis: Literal["measured", "estimated"]


class TimeModel(msgspec.Struct, frozen=True):
    """All coefficients."""

    fitted_to: str
    gpu: GpuRates
    host: HostRates
    overlap: Overlap
    link: LinkRates
    optimizer: list[OptimizerRates]

    def rates_of(self, optimizer: str, implementation: str) -> OptimizerRates:
        """Rates of one implementation.

        Raises:
            DataError: The table has none.
        """
        for row in self.optimizer:
            if (row.id, row.implementation) == (optimizer, implementation):
                return row
        raise DataError(f"step_time.toml has no row for {optimizer} with implementation={implementation}")


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


class StepSeconds(msgspec.Struct, frozen=True):
    """Time of one step in seconds.

    Attributes:
        step: The whole step, all its micro-steps.
        forward: All forwards; likewise `backward`, with what is computed again.
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


@cache
def load_time_model() -> TimeModel:
    """The fitted coefficients.

    Raises:
        DataError: The table is damaged.
    """
    try:
        table = tomllib.loads(files("optplan.planner.data").joinpath("step_time.toml").read_text("utf-8"))
        return msgspec.convert(table, TimeModel)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise DataError(f"step_time.toml is damaged: {error}") from error


def timed_gpu(gpu: Gpu) -> Gpu | None:
    """The GPU if its rates are known, None for a memory budget."""
    return gpu if gpu.peak_flops and gpu.achievable_bandwidth_bytes_per_s else None


def basis_of(gpu: Gpu) -> Basis:
    """Whether times on this GPU are fitted to measurements there or scaled from another's."""
    return "calibrated" if gpu.id == CALIBRATED_GPU else "scaled"


def product_rate(gpu: Gpu, precision: str, *, model: TimeModel) -> float:
    """Operations per second of the model's products under one precision."""
    rates = model.gpu
    dtype = {"fp32": "fp32", "fp16-amp": "fp16"}.get(precision, "bf16")
    if dtype == "fp32" or dtype not in gpu.peak_flops:
        return rates.product_share_fp32 * gpu.peak_flops["fp32"]
    return rates.product_share_16bit * gpu.peak_flops[dtype]


def phase_busy(work: PhaseWork, gpu: Gpu, precision: str, *, model: TimeModel) -> Busy:
    """How long one phase of one micro-step keeps GPU and host busy."""
    rate, rates = product_rate(gpu, precision, model=model), model.gpu
    share = rates.product_share_fp32 if precision == "fp32" else rates.product_share_16bit
    bandwidth = gpu.achievable_bandwidth_bytes_per_s or 0.0
    seconds = work.product_flops / rate + work.attention_flops / (rate / share * rates.attention_share)
    return Busy(seconds + rates.moves_per_written_byte * work.written_bytes / bandwidth, _host_seconds(work, model))


def _host_seconds(work: PhaseWork, model: TimeModel) -> float:
    host = model.host
    layer = host.seconds_per_rotary_layer if work.rotates else host.seconds_per_other_layer
    recomputed = host.seconds_per_recomputed_layer * work.num_recomputed_layers
    return layer * work.num_layers / 2 + recomputed + host.seconds_per_tensor * work.num_tensors


def optimizer_busy(candidate: Candidate, moved_bytes: int, gpu: Gpu, request: StepRequest, *, model: TimeModel) -> Busy:
    """How long the optimizer's step keeps GPU and host busy.

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
    elements = spec.num_parameters * share
    seconds = (moved_bytes + extra) / bandwidth + _slower(gpu) * rates.seconds_per_element * elements
    seconds += share * _product_flops(candidate, rates, spec) / product_rate(gpu, "bf16", model=model)
    if candidate.footprint.host_bytes and candidate.id.startswith("paged"):
        seconds += 2 * candidate.footprint.host_bytes / (gpu.host_link_bytes_per_s or 1e10)
    return Busy(seconds, rates.seconds_per_tensor * len(spec.unique_parameters), links_of_step(request, model=model))


def _updated_share(request: StepRequest) -> float:
    """Share of the model's elements that one rank's optimizer updates."""
    return 1.0 if request.config.sharding in ("none", "ddp", "ddp-copies") else 1.0 / request.config.gpus


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


def combine(forward: Busy, backward: Busy, optimizer: Busy, *, exponent: float) -> StepSeconds:
    """The time of a step whose parts keep GPU and host busy so long."""
    whole = forward.plus(backward).plus(optimizer)
    step = longer(whole, exponent)
    parts = [longer(part, exponent) for part in (forward, backward, optimizer)]
    scale = step / sum(parts)
    seconds = [scale * part for part in parts]
    return StepSeconds(step, seconds[0], seconds[1], seconds[2], _bound(whole))


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


def micro_step_busy(work: StepWork, request: StepRequest, gpu: Gpu, *, model: TimeModel) -> tuple[Busy, Busy]:
    """How long forward and backward of all micro-steps keep GPU and host busy."""
    precision, count = request.config.precision, request.config.grad_accum
    in_forward, in_backward = links_of_micro_step(request, model=model)
    forward = phase_busy(work.forward, gpu, precision, model=model).plus(Busy(0.0, 0.0, in_forward))
    backward = phase_busy(work.backward, gpu, precision, model=model).plus(Busy(0.0, 0.0, in_backward))
    return forward.times(count), backward.times(count)


def links_of_micro_step(request: StepRequest, *, model: TimeModel) -> tuple[float, float]:
    """Seconds that the links between GPUs are busy in one micro-step's forward and backward."""
    traffic, rate = link_traffic(request), _link_rate(request, model)
    return traffic.forward_bytes / rate, traffic.backward_bytes / rate


def links_of_step(request: StepRequest, *, model: TimeModel) -> float:
    """Seconds that they are busy once a step."""
    return link_traffic(request).step_bytes / _link_rate(request, model)


def _link_rate(request: StepRequest, model: TimeModel) -> float:
    return model.link.bandwidth_share * link_bytes_per_s(request)
