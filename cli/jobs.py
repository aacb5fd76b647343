"""What a command is asked: its options, or another program's job file with the options before it."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optplan.planner.trainers.importing import JobRequest


def asked(
    path: str | None,
    *,
    model: str | None,
    optimizers: list[str] | None,
    settings: list[str] | None,
    step: dict[str, Any],
    given: Collection[str],
) -> JobRequest:
    """The request that a job file and the command line make together; the command line alone without a file.

    Args:
        path: The file, None if there is none.
        model: The model asked for; likewise the optimizers and their settings.
        step: The step's flags with their defaults.
        given: Names of those flags that stand on the command line.

    Raises:
        ConfigError: The file cannot be read, or nothing names a model.
    """
    from optplan.planner.trainers.importing import JobRequest, read_job, request_of

    if path is not None:
        job = read_job(path)
        return request_of(job, model=model, optimizers=optimizers, settings=settings, step=step, given=given)
    return JobRequest(model=named(model), optimizers=optimizers or None, settings=settings or [], step=step, notes=[])


def named(model: str | None, *, option: str = "--model") -> str:
    """The model.

    Args:
        model: The model, None if there is none.
        option: What names it on the command line, with -m for short.

    Raises:
        ConfigError: There is none.
    """
    from optplan.planner.errors import ConfigError

    if model is None:
        raise ConfigError(f"missing option '{option}' / '-m'; or give a job with --from FILE")
    return model
