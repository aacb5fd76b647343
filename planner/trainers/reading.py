"""A job file on its way to a request: which of its keys were understood, what was assumed, what is left."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from typing import Any

import msgspec

from optplan.planner.errors import ConfigError, DataError, shorten


class Assumption(msgspec.Struct, frozen=True):
    """A default that was taken.

    Attributes:
        flag: The field of `StepFlags` that it fills, empty if none.
        text: The default and why, in words.
    """

    flag: str
    text: str


class ImportedJob(msgspec.Struct, frozen=True, kw_only=True):
    """What a job file says of a training step.

    Attributes:
        path: The file.
        format: The program it is for, as `--export` names it, or torchtune.
        model: What it trains, None if it does not say.
        optimizer: Optimizer id, None if it names one that is not modelled.
        options: Its implementation and options.
        flags: Fields of `StepFlags` that follow from the file.
        gpus: Number of GPUs if the file says so.
        sharding: How several GPUs would divide the work.
        assumed: Defaults taken where the file says nothing.
        not_modelled: Keys that change memory in a way that is not modelled.
        not_understood: Keys that are not known.
        notes: What else is to be known.
    """

    path: str
    format: str
    model: str | None
    optimizer: str | None
    options: dict[str, Any]
    flags: dict[str, Any]
    gpus: int | None
    sharding: str
    assumed: list[Assumption]
    not_modelled: list[str]
    not_understood: list[str]
    notes: list[str]


class Reading:
    """One job file being read; a key is understood once it has been taken."""

    def __init__(self, document: dict[str, Any], *, path: str, format: str) -> None:
        self.path, self.format = path, format
        self.where = shorten(path, limit=200)
        self._fields = dict(_flat(document))
        self._taken: set[str] = set()
        self.model: str | None = None
        self.optimizer: str | None = None
        self.options: dict[str, Any] = {}
        self.flags: dict[str, Any] = {}
        self.gpus: int | None = None
        self.sharding = "none"
        self.assumed: list[Assumption] = []
        self.notes: list[str] = []
        self._not_modelled: list[str] = []

    def take(self, key: str, *others: str) -> Any:
        """The value of the first of these keys that is there and not null; all of them count as understood."""
        self._taken.update((key, *others))
        return next((self._fields[name] for name in (key, *others) if self._fields.get(name) is not None), None)

    def integer(self, key: str, *others: str) -> int | None:
        """A whole number.

        Raises:
            ConfigError: The value is something else.
        """
        value = self.take(key, *others)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        raise self._wrong(key, "a whole number", value)

    def number(self, key: str) -> float | None:
        """A number; text such as `1e-5`, which YAML 1.1 leaves text, is read as one.

        Raises:
            ConfigError: The value is something else.
        """
        value = self.take(key)
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                raise self._wrong(key, "a number", value) from None
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            return None if value is None else float(value)
        raise self._wrong(key, "a number", value)

    def boolean(self, key: str, *others: str) -> bool | None:
        """True or false.

        Raises:
            ConfigError: The value is something else.
        """
        value = self.take(key, *others)
        if value is None or isinstance(value, bool):
            return value
        raise self._wrong(key, "true or false", value)

    def text(self, key: str, *others: str) -> str | None:
        """Text.

        Raises:
            ConfigError: The value is something else.
        """
        value = self.take(key, *others)
        if value is None or isinstance(value, str):
            return value
        raise self._wrong(key, "text", value)

    def keys_under(self, prefix: str) -> list[str]:
        """The keys within a table, with its name and a dot before them."""
        return [key for key in self._fields if key.startswith(prefix + ".")]

    def set(self, flag: str, value: Any, *, default: Any, why: str) -> None:
        """A flag of the step from the file, or a default that is stated."""
        if value is None:
            self.assume(f"--{flag.replace('_', '-')} {default}", why, flag=flag)
        self.flags[flag] = default if value is None else value

    def assume(self, what: str, why: str, *, flag: str = "") -> None:
        """State a default that was taken; no longer one if the user gives the flag."""
        self.assumed.append(Assumption(flag, f"{what} ({why})"))

    def leave_out(self, key: str) -> None:
        """A key that is known and changes memory in a way that is not modelled."""
        self._taken.add(key)
        self._not_modelled.append(key)

    def refuse(self, key: str, what: str) -> ConfigError:
        """The error for a job of another kind than the full training that estimates are of."""
        value = shorten(self._fields.get(key))
        return ConfigError(
            f"{self.where} has {key}: {value}, which {what}; only training of all parameters is modelled"
        )

    def finish(self) -> ImportedJob:
        """The job with what is left of the file."""
        rest = [key for key in self._fields if key not in self._taken and not self._is_ignored(key)]
        patterns = _table()[self.format]["not_modelled"]
        known = [key for key in rest if any(fnmatchcase(key, pattern) for pattern in patterns)]
        inactive = [key for key in known if not self._fields[key]]
        return ImportedJob(
            path=self.path,
            format=self.format,
            model=self.model,
            optimizer=self.optimizer,
            options=self.options,
            flags=self.flags,
            gpus=self.gpus,
            sharding=self.sharding,
            assumed=self.assumed,
            not_modelled=[*self._not_modelled, *(key for key in known if key not in inactive)],
            not_understood=[key for key in rest if key not in known],
            notes=self.notes,
        )

    def _is_ignored(self, key: str) -> bool:
        return any(fnmatchcase(key, pattern) for pattern in _table()[self.format]["ignored"])

    def _wrong(self, key: str, wanted: str, value: object) -> ConfigError:
        return ConfigError(f"{self.where}: {key} must be {wanted}, got {shorten(value)}")


def _flat(document: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """The fields with dotted keys; a table that is empty keeps its own."""
    fields: list[tuple[str, Any]] = []
    for key, value in document.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            fields += _flat(value, f"{name}.")
        else:
            fields.append((name, value))
    return fields


@cache
def _table() -> dict[str, dict[str, list[str]]]:
    """Per program the keys that memory does not depend on, and those whose effect is not modelled.

    Raises:
        DataError: The table is damaged.
    """
    try:
        text = files("optplan.planner.data").joinpath("trainers.toml").read_text("utf-8")
        return msgspec.convert(tomllib.loads(text)["program"], dict[str, dict[str, list[str]]])
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, KeyError) as error:
        raise DataError(f"trainers.toml is damaged: {error}") from error
