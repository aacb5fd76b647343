"""What `optplan profile` asks for, checked and run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from optplan.planner.candidates import OptimizerChoice, choose_optimizers
from optplan.planner.catalog import load_model
from optplan.planner.errors import ConfigError, OptplanError, shorten
from optplan.planner.gpus import Gpu, find_gpu
from optplan.planner.measured.measurement import Measurement
from optplan.planner.request import StepRequest, check_request
from optplan.profilers.live.measure import Progress, measure
from optplan.profilers.live.sharded import Launch, OtherRankError, check_launch, find_launch, measure_together

_DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,3})?")
CPU_GPU = "h200-141g"
"""GPU that a request names where the step runs on the CPU and no GPU is asked about."""


def profile(
    model: str,
    *,
    optimizer: str,
    options: Mapping[str, object] | Sequence[str] | None = None,
    device: str = "cuda",
    num_steps: int = 8,
    gpu: str | None = None,
    progress: Progress = lambda _: None,
    **step: Any,
) -> Measurement | None:
    """Measure one training step of a catalogue model on this machine.

    Started by `torchrun`, every process measures its part of the step and the first has the record; the others None.

    Args:
        model: As `optplan estimate` takes it.
        optimizer: One optimizer id.
        options: Its options.
        device: `cuda`, `cuda:1` ... or `cpu`.
        num_steps: Steps in all.
        gpu: What the GPU is in the catalogue; found by its own name when None.
        progress: Told what is being done.
        step: How the step is run, as in `StepFlags`.

    Raises:
        ConfigError: Something is unknown, out of range, or not on this machine.
        OtherRankError: This process is one of several and another tells what is wrong.
    """
    launch = find_launch()
    if launch is None:
        work = _prepare(model, optimizer, options, device=device, num_steps=num_steps, gpu=gpu, launch=None, step=step)
        return work.measure(progress)
    try:
        work = _prepare(
            model, optimizer, options, device=device, num_steps=num_steps, gpu=gpu, launch=launch, step=step
        )
    except OptplanError:
        # Every rank finds the same; the first tells of it.
        if launch.rank == 0:
            raise
        raise OtherRankError from None
    told = progress if launch.rank == 0 else lambda _: None
    return measure_together(launch, work.device, lambda: work.measure(told))


class _Work(NamedTuple):
    """What is measured, once it is checked."""

    request: StepRequest
    choice: OptimizerChoice
    device: torch.device
    num_steps: int

    def measure(self, progress: Progress) -> Measurement:
        """Measure it."""
        return measure(self.request, self.choice, device=self.device, num_steps=self.num_steps, progress=progress)


def _prepare(
    model: str,
    optimizer: str,
    options: Mapping[str, object] | Sequence[str] | None,
    *,
    device: str,
    num_steps: int,
    gpu: str | None,
    launch: Launch | None,
    step: dict[str, Any],
) -> _Work:
    check_launch(launch, step.get("sharding", "none"))
    target = check_device(device if launch is None or device != "cuda" else f"cuda:{launch.local_rank}")
    if gpu is None:
        gpu = this_gpu(target).id if target.type == "cuda" else CPU_GPU
    ranks: dict[str, Any] = {} if launch is None else {"gpus": launch.num_ranks, "nodes": launch.num_nodes}
    request = check_request(load_model(model), gpu=gpu, **ranks, **step)
    (choice,) = choose_optimizers(optimizer, options)
    return _Work(request, choice, target, num_steps)


def check_device(name: str) -> torch.device:
    """The device that a name means, with its index.

    Raises:
        ConfigError: The name is malformed, or there is no such device.
    """
    if not _DEVICE.fullmatch(name):
        raise ConfigError(f"--device {shorten(name)} is not known; allowed: cpu, cuda, cuda:0, cuda:1 ...")
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if not count:
        raise ConfigError(
            "no CUDA GPU is visible to torch (driver missing, CUDA_VISIBLE_DEVICES empty, or a torch without CUDA); "
            "--device cpu measures tensors without an allocator"
        )
    index = int(name.partition(":")[2] or 0)
    if index >= count:
        raise ConfigError(f"--device {name} is not there: torch sees {count}; allowed: cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", index)


def this_gpu(device: torch.device) -> Gpu:
    """The catalogue's row of the GPU in this machine.

    Raises:
        ConfigError: It is none of the catalogue's.
    """
    properties = torch.cuda.get_device_properties(device)
    return find_gpu(properties.name, properties.total_memory)
