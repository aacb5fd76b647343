"""What `optplan validate` measures on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from optplan.planner.errors import ConfigError, shorten
from optplan.profilers.live.command import CPU_GPU, check_device, this_gpu
from optplan.profilers.live.measure import MIN_STEPS
from optplan.profilers.validation.matrix import fitting, read_matrix
from optplan.profilers.validation.runner import Progress, run_cases


def run_matrix(
    matrix: str,
    folder: Path,
    *,
    device: str,
    steps: int,
    budget_seconds: float,
    keep_history: bool,
    tell: Callable[[str], None],
) -> dict[str, str]:
    """Measure the steps of a matrix that fit on this machine's GPU.

    Returns:
        What was not measured, by name, with the reason.

    Raises:
        ConfigError: The matrix, the device, the number of steps or the time is not what it may be.
    """
    if not 0 < budget_seconds < math.inf:
        raise ConfigError(f"--minutes must be above 0, got {shorten(budget_seconds / 60)}")
    if steps < MIN_STEPS:
        raise ConfigError(f"--steps must be at least {MIN_STEPS}, the last of which is recorded; got {steps}")
    cases = read_matrix(matrix)
    target = check_device(device)
    gpu = this_gpu(target).id if target.type == "cuda" else CPU_GPU
    judged = list(fitting(cases, gpu=gpu))
    outcome = run_cases(
        [case for case, reason in judged if reason is None],
        folder,
        device=device,
        num_steps=steps,
        budget_seconds=budget_seconds,
        keep_history=keep_history,
        progress=lambda now: tell(_shown(now)),
    )
    return (
        {case.name: reason for case, reason in judged if reason is not None}
        | outcome.failed
        | dict.fromkeys(outcome.left, "not measured: the time was over; the same command goes on here")
    )


def _shown(now: Progress) -> str:
    width = 24
    filled = width * now.done // max(now.total, 1)
    return f"[{'#' * filled}{'.' * (width - filled)}] {now.done} of {now.total} {now.case}"
