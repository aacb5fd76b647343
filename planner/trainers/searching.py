"""`recommend --from FILE`: what the search takes from another program's job, and how the job fares as it is written.

The model, the sequences, the tokens of a step and the GPUs are the job; how it is run is what the search answers.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec

from optplan.planner.catalog import load_model
from optplan.planner.errors import ConfigError
from optplan.planner.estimate import estimate
from optplan.planner.records import Estimate
from optplan.planner.request import default_seq_len
from optplan.planner.trainers.importing import request_of, set_aside
from optplan.planner.trainers.reading import ImportedJob
from optplan.planner.units import format_gib

_OF_THE_JOB = ("seq_len", "attention", "clip_grad_norm", "keep_grads", "padding_mask", "empty_cache", "alloc_conf")
"""What a job's flags say of the job itself; the rest is how it is run."""
_STEP = ("gpu", "memory", *_OF_THE_JOB, "state_dtype")


class JobQuestion(msgspec.Struct, frozen=True):
    """A search for a job.

    Attributes:
        model: Name or path of the model.
        asked: Options of the search.
        notes: What was taken from the file, what is searched instead, and the job as it is written.
    """

    model: str
    asked: dict[str, Any]
    notes: list[str]


def question_of(
    job: ImportedJob, *, model: str | None, step: dict[str, Any], search: dict[str, Any], given: Collection[str]
) -> JobQuestion:
    """The search for a job, with what the command line says besides.

    Args:
        job: What the file says.
        model: The model asked for, None if the file's is meant.
        step: The step's flags with their defaults.
        search: The search's options with their defaults.
        given: Names of those options that were asked for and so go before the file.

    Raises:
        ConfigError: Neither the file nor the command line names a model.
    """
    taken = {key: value for key, value in job.flags.items() if key in _OF_THE_JOB and key not in given}
    gpus = search["gpus"] if "gpus" in given else str(job.gpus or 1)
    asked = search | {"gpus": gpus} | {name: step[name] for name in _STEP if name in step} | taken
    whole = {"gpus": 1, "sharding": "none"} | step
    stays = {name for name in given if name in step}
    written = request_of(job, model=model, optimizers=None, settings=None, step=whole, given=stays)
    if "tokens_per_step" not in given:
        seq_len = asked.get("seq_len") or default_seq_len(load_model(written.model))
        asked["tokens_per_step"] = _tokens(job, seq_len, gpus, batch_size=search["batch_size"])
    aside = set_aside(job, job.model or written.model, {*given} - stays)
    notes = [_as_written(job, written.model, written.step), *written.notes, *aside, _searched(job, given)]
    return JobQuestion(written.model, asked, [note for note in notes if note])


def _tokens(job: ImportedJob, seq_len: Any, gpus: str, *, batch_size: Any) -> int | None:
    """Tokens of one step of the job on these GPUs: a whole number of sequences for the most of them.

    None where a number is out of range: the search says so.
    """
    counts = [int(part) for part in gpus.split("..") if part.isascii() and part.isdigit()]
    given = [job.flags.get("batch_size", 1), job.flags.get("grad_accum", 1), seq_len, batch_size or 1, *counts]
    sizes = [size for size in given if isinstance(size, int) and size > 0]
    if not counts or len(sizes) < len(given):
        return None
    batch, accumulated, length, micro_batch = sizes[:4]
    sequences, least = batch * accumulated * counts[0], counts[-1] * micro_batch
    return -(-sequences // least) * least * length


def _searched(job: ImportedJob, given: Collection[str]) -> str | None:
    """What the file says and the search answers for itself."""
    names = [key for key in job.flags if key not in _OF_THE_JOB and key not in ("batch_size", "grad_accum", *given)]
    names = [name for name in names if job.flags[name] not in (None, False)]
    names += [name for name, value in (("optimizer", job.optimizer),) if value and name not in given]
    if not names:
        return None
    flags = ", ".join("--" + name.replace("_", "-") for name in names)
    return f"searched instead of taken from the file: micro-batch and accumulation, {flags}; fix what must stay"


def _as_written(job: ImportedJob, model: str, step: dict[str, Any]) -> str | None:
    """How the job fares if nothing is changed."""
    if job.optimizer is None or (step.get("gpu") is None and step.get("memory") is None):
        return None
    try:
        (row,) = estimate(model, optimizer=job.optimizer, options=job.options, **step).estimates
    except ConfigError as error:
        return f"as it is written the job cannot run: {error}"
    return f"as it is written, with {job.optimizer}: {_fares(row)}"


def _fares(row: Estimate) -> str:
    if row.peak_allocated_bytes is None:
        return "its peak is not predicted"
    words = f"peak {format_gib(row.peak_allocated_bytes)}, {'fits' if row.fits else 'does not fit'}"
    return words + (f", {row.step_seconds['step']:.3g} s a step" if row.step_seconds else "")
