"""What `optplan validate` measures on this machine."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from optplan.planner.catalog import load_model
from optplan.planner.errors import ConfigError, OptplanError, shorten
from optplan.planner.gpus import find_gpu
from optplan.planner.optimizers.registry import OPTIMIZERS
from optplan.profilers.live.command import CPU_GPU, check_device
from optplan.profilers.live.environment import NOTE_VARIABLE
from optplan.profilers.live.measure import MIN_STEPS
from optplan.profilers.validation.gpus import VisibleGpu
from optplan.profilers.validation.launching import Launcher, launching
from optplan.profilers.validation.matrix import ValidationCase, read_matrix, refusal
from optplan.profilers.validation.runner import Limits, Progress, run_cases

PRELOADED = (
    "torch",
    "torch._dynamo",
    "torch.profiler._cupti_monitor",
    "optplan.boundary",
    "optplan.app",
    "typer._adapters",
    "optplan.commands.profile",
    "optplan.reports.terminal.measurement",
    "optplan.planner.measured.expectation",
    "optplan.profilers.live.command",
    "optplan.profilers.workloads.sharded_real_step",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "optplan.optim_impls:AdamW",
    "optplan.optim_impls:AdamMini",
    "optplan.optim_impls:MicroAdam",
    "optplan.optim_impls:Adapprox",
    "optplan.optim_impls.adamw.launcher",
    "optplan.optim_impls.adam_mini.launcher",
    "optplan.optim_impls.micro_adam.launcher",
    "optplan.optim_impls.adapprox.launcher",
    "pynvml",
)
"""What a measurement imports, but for the model's own code."""
BUSY_HOST = "measured while other GPUs of this host were busy: the host's share of the times may be longer"
"""Note of records that are made beside others."""
_GPUS = "optplan.profilers.validation.gpus"
_GPU_SECONDS = 120.0


def run_matrix(
    matrix: str,
    folder: Path,
    *,
    device: str,
    steps: int,
    budget_seconds: float,
    keep_history: bool,
    gpus_in_parallel: int,
    tell: Callable[[str], None],
) -> dict[str, str]:
    """Measure the steps of a matrix that fit on this machine's GPU.

    Returns:
        What was not measured, by name, with the reason.

    Raises:
        ConfigError: The matrix, the device, the number of steps or the time is not what it may be.
    """
    _check(budget_seconds, steps, gpus_in_parallel, device)
    cases = read_matrix(matrix)
    target = check_device(device)
    with launching(_preloaded(cases), probe=_GPUS if target.type == "cuda" else None) as launcher:
        seen = _visible_gpus(launcher) if target.type == "cuda" else []
        outcome = run_cases(
            cases,
            folder,
            launcher=launcher,
            device=device,
            limits=Limits(steps, budget_seconds, keep_history),
            places=_places(gpus_in_parallel, len(seen)),
            refuse=_refusing(seen, target.index or 0),
            progress=lambda now: tell(_shown(now)),
        )
    return (
        outcome.skipped
        | outcome.failed
        | dict.fromkeys(outcome.left, "not measured: the time was over; the same command goes on here")
    )


def _check(budget_seconds: float, steps: int, gpus_in_parallel: int, device: str) -> None:
    if not 0 < budget_seconds < math.inf:
        raise ConfigError(f"--minutes must be above 0, got {shorten(budget_seconds / 60)}")
    if steps < MIN_STEPS:
        raise ConfigError(f"--steps must be at least {MIN_STEPS}, the last of which is recorded; got {steps}")
    if gpus_in_parallel < 1:
        raise ConfigError(f"--gpus-in-parallel must be at least 1, got {gpus_in_parallel}")
    if gpus_in_parallel > 1 and device != "cuda":
        raise ConfigError(f"--gpus-in-parallel {gpus_in_parallel} goes with --device cuda, got {shorten(device)}")


def _preloaded(cases: Iterable[ValidationCase]) -> list[Sequence[str]]:
    """What a server imports: the models' code too, or all but transformers where that touches a GPU."""
    listed = list(cases)
    models = dict.fromkeys(load_model(case.model).architecture for case in listed)
    optimizers = {case.optimizer: OPTIMIZERS.get(case.optimizer) for case in listed}
    described = [place for entry in optimizers.values() if entry for place in entry.implementations.values()]
    modules = dict.fromkeys(f"optplan.planner.optimizers.{place.partition(':')[0]}" for place in described)
    return [(*PRELOADED, *modules, *(f"transformers:{name}" for name in models)), PRELOADED]


def _visible_gpus(launcher: Launcher) -> list[VisibleGpu]:
    told = launcher.probed
    if told is None:
        asked = launcher.start(_GPUS, [], {})
        if not asked.wait(_GPU_SECONDS) or asked.status:
            raise OptplanError(f"the GPUs cannot be asked: {asked.last_words()}")
        told = asked.output
    return msgspec.json.decode(told, type=list[VisibleGpu])


def _refusing(seen: Sequence[VisibleGpu], index: int) -> Callable[[ValidationCase], str | None]:
    """What says why a case is not measured here."""
    gpu = find_gpu(seen[index].name, seen[index].total_bytes).id if seen else CPU_GPU

    def refuse(case: ValidationCase) -> str | None:
        if seen and case.num_gpus > len(seen):
            return f"it needs {case.num_gpus} GPUs, torch sees {len(seen)}"
        return refusal(case, gpu=gpu)

    return refuse


def _places(gpus_in_parallel: int, num_gpus: int) -> list[dict[str, str]]:
    """The variables that show a process one GPU alone, for as many as are measured on at once."""
    if gpus_in_parallel == 1:
        return [{}]
    if gpus_in_parallel > num_gpus:
        raise ConfigError(f"--gpus-in-parallel {gpus_in_parallel} is more than the {num_gpus} that torch sees")
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(index) for index in range(num_gpus)]
    chosen = names[:gpus_in_parallel]
    return [{"CUDA_VISIBLE_DEVICES": name.strip(), NOTE_VARIABLE: BUSY_HOST} for name in chosen]


def _shown(now: Progress) -> str:
    width = 24
    filled = width * now.done // max(now.total, 1)
    return f"[{'#' * filled}{'.' * (width - filled)}] {now.done} of {now.total} {now.case}"
