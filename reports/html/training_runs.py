"""Training runs as `benchmarks/train_study.py` records them, and the curves of the best of each optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Literal

import msgspec


class TrainingRun(msgspec.Struct, frozen=True, kw_only=True):
    """One run; fields of the record that no page shows are left out.

    Attributes:
        stage: `sweep`, `final` (the best learning rate, one run a seed) or another.
        final_validation_loss: None where the run diverged.
        train_losses: Pairs of step and loss; likewise `validation_losses`.
        environment: Where it ran: GPU, versions, commit.
    """

    schema: Literal["optplan.training/1"]
    optimizer: str
    stage: str
    lr: float
    seed: int
    num_steps: int
    betas: list[float]
    final_validation_loss: float | None
    train_losses: list[tuple[int, float]]
    validation_losses: list[tuple[int, float]]
    state_bytes: int
    num_parameters: int
    environment: dict[str, object]


class Curve(msgspec.Struct, frozen=True):
    """One optimizer's loss by step, the mean over its seeds."""

    optimizer: str
    steps: list[int]
    losses: list[float]


def newest(runs: Iterable[TrainingRun]) -> dict[str, list[TrainingRun]]:
    """Final runs by optimizer, those of its newest commit alone."""
    runs = list(runs)
    commits = {run.optimizer: run.environment.get("commit") for run in runs}
    kept: dict[str, list[TrainingRun]] = {}
    for run in runs:
        if run.stage == "final" and run.environment.get("commit") == commits[run.optimizer]:
            kept.setdefault(run.optimizer, []).append(run)
    return kept


def mean_curve(name: str, series: Sequence[Sequence[tuple[int, float]]]) -> Curve:
    """The mean of several curves at the steps that all of them have."""
    tables = [dict(points) for points in series]
    steps = [step for step in tables[0] if all(step in table for table in tables)]
    return Curve(name, steps, [fmean(table[step] for table in tables) for step in steps])


def spread(losses: Sequence[float]) -> float | None:
    """Standard deviation over the seeds, None for one."""
    return stdev(losses) if len(losses) > 1 else None
