"""Which steps are measured: the matrix of `planner/data/validation.toml`, as commands."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import msgspec

from optplan.planner.errors import ConfigError, DataError, unknown
from optplan.planner.estimate import estimate

_FLAGS = ("precision", "batch_size", "seq_len", "grad_accum", "checkpointing", "attention", "sharding")


class ValidationCase(msgspec.Struct, frozen=True):
    """One step to measure.

    Attributes:
        model: Catalogue id.
        optimizer: Optimizer id.
        settings: Its options, as `key=value`.
        step: How the step is run, by the names of `StepFlags`.
        num_gpus: Processes that take it together, a GPU each.
    """

    model: str
    optimizer: str
    settings: tuple[str, ...]
    step: dict[str, Any]
    num_gpus: int = 1

    @property
    def name(self) -> str:
        """A file name that no other case has."""
        parts = [self.model, self.optimizer, *self.settings, *(f"{key}={value}" for key, value in self.step.items())]
        if self.num_gpus > 1:
            parts.append(f"gpus={self.num_gpus}")
        return re.sub(r"[^A-Za-z0-9.=_-]+", "-", "_".join(parts))

    @property
    def arguments(self) -> list[str]:
        """The command line of `optplan profile` that measures it."""
        words = ["--model", self.model, "--optimizer", self.optimizer]
        for setting in self.settings:
            words += ["--set", setting]
        for key, value in self.step.items():
            words += [f"--{key.replace('_', '-')}", str(value)]
        return words


def matrix_names() -> tuple[str, ...]:
    """Names of the matrices."""
    return tuple(_tables())


def read_matrix(name: str) -> list[ValidationCase]:
    """The cases of one matrix, each once, in the order of the file.

    Raises:
        ConfigError: There is no such matrix.
    """
    tables = _tables()
    if name not in tables:
        raise unknown("matrix", name, tables)
    cases = itertools.chain.from_iterable(map(_product, tables[name]))
    return list({case.name: case for case in cases}.values())


def refusal(case: ValidationCase, *, gpu: str) -> str | None:
    """Why a case is not measured on this GPU, None if it is."""
    options = list(case.settings)
    try:
        report = estimate(
            case.model, gpu=gpu, optimizer=case.optimizer, options=options, gpus=case.num_gpus, **case.step
        )
    except ConfigError as error:
        return str(error)
    return "it does not fit" if report.estimates[0].fits is False else None


def _tables() -> dict[str, list[dict[str, Any]]]:
    try:
        text = files("optplan.planner.data").joinpath("validation.toml").read_text("utf-8")
        tables: dict[str, list[dict[str, Any]]] = tomllib.loads(text)["matrix"]
    except (tomllib.TOMLDecodeError, KeyError) as error:
        raise DataError(f"validation.toml is damaged: {error}") from error
    return tables


def _product(table: dict[str, Any]) -> Iterator[ValidationCase]:
    keys = [key for key in _FLAGS if key in table]
    for model, optimizer, *values in itertools.product(
        table["model"], table["optimizer"], *(table[key] for key in keys)
    ):
        name, *settings = optimizer.split()
        step = dict(zip(keys, values, strict=True))
        yield ValidationCase(model, name, tuple(settings), step, table.get("gpus", 1))
