"""What `optplan profile` asks for, checked and run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from optplan.planner.candidates import choose_optimizers
from optplan.planner.catalog import load_model
from optplan.planner.errors import ConfigError, shorten
from optplan.planner.gpus import Gpu, find_gpu
from optplan.planner.measurement import Measurement
from optplan.planner.request import check_request
from optplan.profilers.live.measure import Progress, measure

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
) -> Measurement:
    """Measure one training step of a catalogue model on this machine.

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
    """
    target = check_device(device)
    if gpu is None:
        gpu = this_gpu(target).id if target.type == "cuda" else CPU_GPU
    request = check_request(load_model(model), gpu=gpu, **step)
    (choice,) = choose_optimizers(optimizer, options)
    return measure(request, choice, device=target, num_steps=num_steps, progress=progress)


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
