"""A catalogue model's training step run on this machine and measured: what `optplan profile` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, NamedTuple

import torch

from optplan.planner.candidates import Candidate, OptimizerChoice
from optplan.planner.errors import ConfigError
from optplan.planner.gpus import Gpu
from optplan.planner.measured.measurement import Measurement, OutOfMemory, StepTime
from optplan.planner.measured.packed_history import pack
from optplan.planner.records import GpuRow, ModelRow, PhasePeak, ResidentBytes, StepConfig
from optplan.planner.request import StepRequest
from optplan.planner.step_history import StepHistory
from optplan.planner.timeline import Phase
from optplan.planner.timeline_report import categories_of
from optplan.planner.units import format_gib
from optplan.planner.version import VERSION
from optplan.planner.workload import Workload
from optplan.profilers.live.bandwidth import copy_bandwidth
from optplan.profilers.live.devices import DeviceMemory, DeviceReader
from optplan.profilers.live.environment import given_notes, read_environment
from optplan.profilers.live.host_speed import launching_seconds
from optplan.profilers.live.profile import RECORDED_STEP, LiveProfile, out_of_memory
from optplan.profilers.live.step_clock import moments_of_step
from optplan.profilers.workloads.real_step import RealStep, build_real_step

MIN_STEPS = RECORDED_STEP + 1
"""Two steps of warm-up and the recorded one; more are timed."""

INTERRUPTED = "interrupted: fewer steps were timed than asked for"
"""Note of a record whose run was stopped after its recorded step."""

_SIZES_DIFFER = 0.03
"""How far apart two drivers' figures for one GPU's memory can be."""

Progress = Callable[[str], None]


def measure(
    request: StepRequest,
    choice: OptimizerChoice,
    *,
    device: torch.device,
    num_steps: int = 8,
    progress: Progress = lambda _: None,
) -> Measurement:
    """Train a few steps and measure them.

    Args:
        request: Model, GPU and manner of the step.
        choice: The optimizer.
        device: Where to run.
        num_steps: Steps in all; the third is recorded, those after it are timed, but for the first of four or more.
        progress: Told what is being done.

    Raises:
        ConfigError: Fewer steps than are needed, or something in the request cannot be run here.
    """
    if num_steps < MIN_STEPS:
        raise ConfigError(f"--steps must be at least {MIN_STEPS}, the last of which is recorded; got {num_steps}")
    workload = Workload(request)
    (candidate,), _ = workload.candidates([choice])
    on_gpu = device.type == "cuda"
    reader = DeviceReader(device.index or 0) if on_gpu else None
    before = reader.read() if reader else None
    speed = Speed(copy_bandwidth(device), launching_seconds(device)) if on_gpu else Speed()
    run = _Run(device, progress, num_steps, num_micro_steps=request.config.grad_accum)
    run.train(
        lambda: build_real_step(
            request.model, request.config, candidate.optimizer, device, state_dtype=request.state_dtype
        )
    )
    after = reader.read() if reader else None
    return Measurement(
        **_asked(request, candidate, on_gpu=on_gpu),
        time=step_time(run.profile, request.config, moved_bytes=workload.moved_bytes(candidate), speed=speed),
        losses=run.losses(),
        out_of_memory=run.failure,
        environment=read_environment(
            driver=reader.driver if reader else None, other_processes_bytes=held_by_others(before)
        ),
        notes=[
            *_size_notes(request.gpu, device),
            *profile_notes(run.profile, reader),
            *([INTERRUPTED] if run.is_interrupted else []),
        ],
        **profile_fields(run.profile),
        **device_bytes(before, after),
    )


def _asked(request: StepRequest, candidate: Candidate, *, on_gpu: bool) -> dict[str, Any]:
    """The fields of a measurement that say of what it is."""
    gpu = request.gpu
    return {
        "version": VERSION,
        "source": "live",
        "device": "cuda" if on_gpu else "cpu",
        "model": ModelRow(request.model.name, request.model.num_parameters, request.model.source),
        "gpu": GpuRow(gpu.id, gpu.total_bytes, gpu.usable_bytes, gpu.context_bytes) if on_gpu else None,
        "config": request.config,
        "optimizer": candidate.id,
        "implementation": candidate.implementation,
        "options": candidate.options,
        "state_dtype": request.state_dtype,
    }


def _size_notes(gpu: Gpu, device: torch.device) -> list[str]:
    """That the GPU at hand has not the memory of the one that predictions are for: part of one (MIG), or another."""
    if device.type != "cuda":
        return []
    here = torch.cuda.get_device_properties(device).total_memory
    if abs(here - gpu.total_bytes) <= _SIZES_DIFFER * gpu.total_bytes:
        return []
    name, sizes = torch.cuda.get_device_properties(device).name, (format_gib(here), format_gib(gpu.total_bytes))
    return [f"measured on {name} with {sizes[0]}; what is predicted is for {gpu.id} with {sizes[1]}"]


def held_by_others(before: DeviceMemory | None) -> int | None:
    """What others held before this process put anything on the GPU: all of it, where processes are not told apart."""
    if before is None:
        return None
    return before.used_bytes if before.other_bytes is None else before.other_bytes


def profile_notes(profile: LiveProfile | None, reader: DeviceReader | None) -> list[str]:
    """What a reader of the figures must know."""
    notes = [*given_notes(), *([reader.remark] if reader and reader.remark else [])]
    if profile is not None and profile.first_difference:
        notes.append(f"the allocator's record could not be followed exactly: {profile.first_difference}")
    seconds = profile.clocked_seconds() if profile else []
    if profile is not None and seconds:
        share = profile.hook_seconds / sum(seconds)
        notes.append(
            f"observing took {share:.2%} of the time of the steps timed: what its hooks need on the host, against "
            f"the {len(seconds)} steps after the recorded one, forward to the optimizer's end"
        )
    return notes


class _Run:
    """One training run with its observations."""

    def __init__(self, device: torch.device, progress: Progress, num_steps: int, *, num_micro_steps: int) -> None:
        self.profile: LiveProfile | None = None
        self.failure: OutOfMemory | None = None
        self.is_interrupted = False
        self._device = device
        self._progress = progress
        self._num_steps = num_steps
        self._num_moments = (num_steps - MIN_STEPS) * moments_of_step(num_micro_steps)
        self._losses = Losses(num_steps)

    def train(self, build: Callable[[], RealStep]) -> None:
        """Build and take the steps; running out of memory ends them quietly."""
        try:
            self._progress("building the model")
            step = build()
        except torch.cuda.OutOfMemoryError as error:
            self.failure = out_of_memory(error, "load", self._device)
            return
        self.profile = LiveProfile(step.model, step.optimizer)
        try:
            with self.profile.observing(num_moments=self._num_moments):
                self._take_steps(step, self.profile)
        except torch.cuda.OutOfMemoryError:
            self.failure = self.profile.out_of_memory
        except KeyboardInterrupt:
            # What is measured already is worth keeping; before that there is nothing.
            if self.profile.num_steps <= self.profile.recorded_step:
                raise
            self.is_interrupted = True

    def losses(self) -> list[float]:
        """The loss of every step."""
        return self._losses.read()

    def _tell(self, index: int) -> None:
        """Say which step begins; of those that are timed once, as nothing is to be shown while the clock runs."""
        last = f" to {self._num_steps}" if index == MIN_STEPS < self._num_steps - 1 else ""
        if index <= MIN_STEPS:
            self._progress(f"step {index + 1}{last} of {self._num_steps}")

    def _take_steps(self, step: RealStep, profile: LiveProfile) -> None:
        for index in range(self._num_steps):
            self._tell(index)
            # Copied, so that no loss outlives its step.
            self._losses.note(step.take())
            if index == profile.recorded_step:
                profile.finish_step()


class Losses:
    """The loss of every step, kept on the host: on the GPU it would be memory that the loop itself has not."""

    def __init__(self, num_steps: int) -> None:
        """Prepare for as many steps."""
        self._num_steps = num_steps
        self._kept: torch.Tensor | None = None
        self._num_taken = 0
        self._device = torch.device("cpu")

    def note(self, loss: torch.Tensor) -> None:
        """Keep a step's loss; nobody waits for it."""
        if self._kept is None:
            self._device = loss.device
            # In the loss's own dtype: another one would be converted to on the GPU, in memory of its own.
            self._kept = torch.empty(self._num_steps, dtype=loss.dtype, pin_memory=loss.device.type == "cuda")
        self._kept[self._num_taken].copy_(loss, non_blocking=True)
        self._num_taken += 1

    def read(self) -> list[float]:
        """The losses so far."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return [] if self._kept is None else self._kept[: self._num_taken].tolist()


def profile_fields(profile: LiveProfile | None) -> dict[str, Any]:
    """The fields of a measurement that come from an observed loop."""
    residents = profile.residents if profile else None
    fields: dict[str, Any] = {
        "bytes": residents.bytes if residents else ResidentBytes(0, 0, 0, 0),
        "state_tensors": residents.state_tensors if residents else {},
    }
    if profile is not None and profile.history is not None:
        fields |= _peak_fields(profile.history, profile.phase_peaks)
        fields["peak_requested_bytes"] = profile.peak_requested_bytes
    return fields


def _peak_fields(history: StepHistory, phases: Mapping[Phase, int]) -> dict[str, Any]:
    peak = max(history.allocated)
    return {
        "phases": {phase: PhasePeak(most) for phase, most in phases.items()},
        "peak_allocated_bytes": peak,
        "peak_phase": next(phase for phase, most in phases.items() if most == peak),
        "peak_categories": categories_of(history.alive(history.peak_event)),
        "peak_reserved_bytes": history.reserved_bytes,
        "history": pack(history),
    }


class Speed(NamedTuple):
    """How fast the machine was found to be just before, where that was measured.

    Attributes:
        copy_bandwidth: Bytes a second of a copy on the GPU.
        launch_seconds: What the host takes to launch one operation.
    """

    copy_bandwidth: float | None = None
    launch_seconds: float | None = None


def step_time(profile: LiveProfile | None, config: StepConfig, *, moved_bytes: int, speed: Speed) -> StepTime | None:
    """Times of the steps that are timed, None if there were none.

    Args:
        profile: The observed loop.
        config: How its steps were run.
        moved_bytes: What the optimizer's step must at least read and write.
        speed: Of the same GPU and host.
    """
    seconds = profile.step_seconds() if profile else []
    if not seconds or profile is None:
        return None
    phases, step_seconds = profile.phase_seconds(), median(seconds)
    in_step, bandwidth = phases.get("step"), speed.copy_bandwidth
    return StepTime(
        step_seconds=step_seconds,
        phases=phases,
        num_steps=len(seconds),
        tokens_per_second=config.batch_size * config.seq_len * config.grad_accum / step_seconds,
        optimizer_copy_fraction=moved_bytes / in_step / bandwidth if bandwidth and in_step and moved_bytes else None,
        copy_bandwidth_bytes_per_second=bandwidth,
        host_launch_seconds=speed.launch_seconds,
    )


def device_bytes(before: DeviceMemory | None, after: DeviceMemory | None) -> dict[str, Any]:
    """This process's device memory: the driver's own figure, or what the whole device holds less others' before."""
    if after is None:
        return {}
    if after.process_bytes is not None:
        return {"device_bytes": after.process_bytes, "device_basis": "process"}
    if before is None:
        return {}
    return {"device_bytes": after.used_bytes - before.used_bytes, "device_basis": "difference"}
