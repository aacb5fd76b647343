"""`sweep --from FILE`: a grid around another program's job; an axis that is not given has the job's value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from optplan.planner.trainers.importing import request_of
from optplan.planner.trainers.reading import ImportedJob

_AXIS_OF = {
    "precision": "precisions", "seq_len": "seq_lens", "batch_size": "batch_sizes", "checkpointing": "checkpointing",
    "gpus": "gpus_per_run", "sharding": "sharding",
}  # fmt: skip
"""Flags of a step to the axes of a sweep."""


class JobSweep(msgspec.Struct, frozen=True):
    """A sweep around a job.

    Attributes:
        axes: Their values.
        settings: `key=value` texts of the optimizers.
        step: The rest of the step, the same for every combination.
        notes: What the file says, and what of it was not understood.
    """

    axes: dict[str, Sequence[Any]]
    settings: list[str]
    step: dict[str, Any]
    notes: list[str]


def sweep_of(
    job: ImportedJob,
    *,
    axes: dict[str, Sequence[Any]],
    settings: Sequence[str] | None,
    step: dict[str, Any],
    given: set[str],
) -> JobSweep:
    """The sweep around a job.

    Args:
        job: What the file says.
        axes: Values of the axes that were asked for.
        settings: Options of the optimizers asked for.
        step: The step's flags with their defaults.
        given: Names of those flags that were asked for and so go before the file.

    Raises:
        ConfigError: Neither the file nor the axes name a model.
    """
    models, optimizers = axes.get("models"), axes.get("optimizers")
    said = {flag for flag, axis in _AXIS_OF.items() if axis in axes} | {name for name in given if name in step}
    whole = {"gpus": 1, "sharding": "none"} | step
    read = request_of(
        job,
        model=models[0] if models else None,
        optimizers=list(optimizers) if optimizers else None,
        settings=settings,
        step=whole,
        given=said,
    )
    own: dict[str, Sequence[Any]] = {"models": [read.model]} | _values(job, read.step, axes)
    own |= {"optimizers": read.optimizers} if read.optimizers else {}
    rest = {name: value for name, value in read.step.items() if name not in _AXIS_OF}
    return JobSweep(own | axes, read.settings, rest, read.notes)


def _values(job: ImportedJob, step: dict[str, Any], axes: dict[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    """The job's own value of each axis; how it divides the work holds for the numbers of GPUs that are asked for."""
    found: dict[str, Sequence[Any]] = {}
    for flag, axis in _AXIS_OF.items():
        if step.get(flag) is not None:
            found[axis] = [step[flag]]
    if any(count != 1 for count in axes.get("gpus_per_run", ())):
        found["sharding"] = [job.sharding]
    return found
