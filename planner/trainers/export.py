"""A configuration handed to a training program: `optplan recommend --export TARGET`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from optplan.planner.errors import unknown
from optplan.planner.measured.record_files import write_atomically
from optplan.planner.models.spec import ModelSpec
from optplan.planner.records import StepConfig
from optplan.planner.trainers import accelerate, axolotl, deepspeed, hf_args, llama_factory, python_script, torchtitan
from optplan.planner.trainers.job import Export, TrainingJob, training_job

_WRITERS: dict[str, Callable[[TrainingJob], Export]] = {
    module.TARGET: module.write
    for module in (python_script, hf_args, torchtitan, axolotl, llama_factory, deepspeed, accelerate)
}
TARGETS = tuple(_WRITERS)
"""What `--export` takes."""


def export(
    target: str,
    *,
    model: str | ModelSpec,
    optimizer: str,
    implementation: str,
    options: dict[str, Any],
    config: StepConfig,
    state_dtype: str | None = None,
) -> Export:
    """A configuration as the file of a training program.

    Args:
        target: One of `TARGETS`.
        model: Catalogue name, path, repository, or a model already read.
        optimizer: Id of the optimizer.
        implementation: Its implementation.
        options: Its options as in an estimate; those left out have their defaults.
        config: How the step is run.
        state_dtype: Dtype asked for the moments, as `--state-dtype` takes it.

    Raises:
        ConfigError: The target is unknown, or its program cannot run this configuration; the sentence says which can.
    """
    check_export_target(target)
    job = training_job(
        model,
        optimizer=optimizer,
        implementation=implementation,
        options=options,
        config=config,
        state_dtype=state_dtype,
    )
    return _WRITERS[target](job)


def check_export_target(target: str) -> None:
    """Refuse early a target that is not known.

    Raises:
        ConfigError: It is none of `TARGETS`.
    """
    if target not in _WRITERS:
        raise unknown("target for --export", target, TARGETS)


def write_export(written: Export, path: str | None = None) -> Path:
    """Write an export to a file.

    Args:
        written: What `export` returned.
        path: The file; the usual name in the current folder when None.

    Raises:
        OptplanError: It cannot be written; what was there before still is.
    """
    target = Path(path or written.file_name)
    write_atomically(target, written.text.encode())
    return target
