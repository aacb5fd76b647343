"""`--from FILE`: the request that another program's job file makes, and what of the file it leaves open."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Sequence
from typing import Any

import msgspec

from optplan.planner.errors import ConfigError, printable, shorten
from optplan.planner.trainers.documents import read_document
from optplan.planner.trainers.hf_reading import read_hf_args
from optplan.planner.trainers.program_reading import (
    read_axolotl,
    read_deepspeed,
    read_llama_factory,
    read_torchtitan,
    read_torchtune,
)
from optplan.planner.trainers.reading import ImportedJob, Reading

_READERS: dict[str, Callable[[Reading], None]] = {
    "axolotl": read_axolotl,
    "torchtune": read_torchtune,
    "torchtitan": read_torchtitan,
    "deepspeed": read_deepspeed,
    "llama-factory": read_llama_factory,
    "hf-args": read_hf_args,
}
FORMATS = tuple(_READERS)
"""The programs whose files are read."""

_MARKS: dict[str, tuple[str, ...]] = {
    "axolotl": ("base_model",),
    "deepspeed": ("zero_optimization", "train_micro_batch_size_per_gpu", "train_batch_size"),
    "llama-factory": ("finetuning_type", "cutoff_len", "pure_bf16", "flash_attn", "dataset_dir"),
    "hf-args": ("per_device_train_batch_size", "output_dir", "num_train_epochs", "gradient_checkpointing", "optim"),
}
"""Fields that only files of one program have, the first program that fits taken."""
_LISTED = 20


class JobRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A job file and the command line together; the command line goes first.

    Attributes:
        model: Name or path of the model.
        optimizers: Optimizer ids, None for all.
        settings: `key=value` texts.
        step: Fields of `StepFlags`.
        notes: What the file says, what was assumed, what is not modelled and what was not understood.
    """

    model: str
    optimizers: list[str] | None
    settings: list[str]
    step: dict[str, Any]
    notes: list[str]


def read_job(path: str) -> ImportedJob:
    """What a job file says.

    Args:
        path: A file of HF TrainingArguments, axolotl, LLaMA-Factory, torchtune, torchtitan or DeepSpeed. Nothing that
            it names is opened, run or imported.

    Raises:
        ConfigError: It cannot be read, is of no known program, or trains only a part of the parameters.
    """
    document = read_document(path)
    reading = Reading(document, path=path, format=_format(document, path))
    _READERS[reading.format](reading)
    return reading.finish()


def request_of(
    job: ImportedJob,
    *,
    model: str | None,
    optimizers: Sequence[str] | None,
    settings: Sequence[str] | None,
    step: dict[str, Any],
    given: Collection[str],
) -> JobRequest:
    """The job with what the command line says besides.

    Args:
        job: What the file says.
        model: The model asked for, None if the file's is meant.
        optimizers: The optimizers asked for, None if the file's is meant.
        settings: Options asked for.
        step: The step's flags with their defaults.
        given: Names of those flags that were asked for and so go before the file.

    Raises:
        ConfigError: Neither the file nor the command line names a model.
    """
    name = model or job.model
    if name is None:
        raise ConfigError(f"{shorten(job.path, limit=200)} names no model that is known: add --model NAME")
    given = {*given, *(["optimizer"] if optimizers else [])}
    flags = {key: value for key, value in job.flags.items() if key not in given}
    merged = step | flags
    if "gpus" not in given and job.gpus is not None:
        merged["gpus"] = job.gpus
    if "sharding" not in given:
        merged["sharding"] = job.sharding if merged["gpus"] > 1 else "none"
    chosen = list(optimizers) if optimizers else [job.optimizer] if job.optimizer else None
    ours = [f"{key}={value}" for key, value in job.options.items()] if not optimizers and job.optimizer else []
    return JobRequest(
        model=name,
        optimizers=chosen,
        settings=[*ours, *(settings or ())],
        step=merged,
        notes=_notes(job, name, given),
    )


def _notes(job: ImportedJob, model: str, given: Collection[str]) -> list[str]:
    said = [f"--model {shlex.quote(model)}"] if model == job.model else []
    if job.optimizer and "optimizer" not in given:
        said += [f"--optimizer {job.optimizer}", *(f"--set {key}={value}" for key, value in job.options.items())]
    said += [_flag(key, value) for key, value in job.flags.items() if key not in given and value not in (None, False)]
    where = printable(job.path)
    notes = [f"{where}, a job of {job.format}, is read as {' '.join(said)}"]
    notes += set_aside(job, model, given)
    assumed = [one.text for one in job.assumed if one.flag not in given]
    if "gpus" not in given and job.gpus is None:
        many = "" if job.sharding == "none" else f", with --gpus N its sharding is {job.sharding}"
        assumed.append(f"--gpus 1 (the launcher sets the number{many})")
    notes += [f"assumed: {'; '.join(assumed)}"] if assumed else []
    notes += [printable(note) for note in job.notes]
    for keys, what in (
        (job.not_modelled, "not modelled, and changes memory"),
        (job.not_understood, "not understood"),
    ):
        if keys:
            more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
            notes.append(f"{what}: {printable(', '.join(keys[:_LISTED]))}{more}")
    return notes


def set_aside(job: ImportedJob, model: str, given: Collection[str]) -> list[str]:
    """What the file says and the command line goes before."""
    assumed = {one.flag for one in job.assumed}
    names = {key: value for key, value in job.flags.items() if key in given and key not in assumed}
    names |= {"gpus": job.gpus} if "gpus" in given and job.gpus is not None else {}
    names |= {"optimizer": job.optimizer} if "optimizer" in given and job.optimizer else {}
    names |= {"model": job.model} if job.model not in (None, model) else {}
    said = ", ".join(_flag(key, value) for key, value in names.items() if value not in (None, False))
    return [f"the command line goes before the file's {printable(said)}"] if said else []


def _flag(key: str, value: Any) -> str:
    name = "--" + key.replace("_", "-")
    return name if value is True else f"{name} {value}"


def _format(document: dict[str, Any], path: str) -> str:
    """The program that a document is for, told by fields that only its files have."""
    if "_component_" in str(document.get("model", "")) or "_component_" in str(document.get("optimizer", "")):
        return "torchtune"
    if path.lower().endswith(".toml"):
        if {"training", "parallelism", "activation_checkpoint"} & set(document):
            return "torchtitan"
    else:
        for name, marks in _MARKS.items():
            if any(mark in document for mark in marks):
                return name
    raise ConfigError(
        f"{shorten(path, limit=200)} is no job file of a known program; known: HF TrainingArguments, axolotl, "
        "LLaMA-Factory and torchtune (YAML), torchtitan (TOML), DeepSpeed (JSON)"
    )
