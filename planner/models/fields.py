"""Checked access to the fields of a configuration from outside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optplan.planner.errors import ConfigError, shorten

MAX_WIDTH = 2**20
"""Largest width, vocabulary share or head count accepted in one field: 30 times the widest published model."""
MAX_VOCABULARY = 2**24
MAX_LAYERS = 10_000
MAX_EXPERTS = 10_000

_REQUIRED: Any = object()


class Fields:
    """The fields of one `config.json`, each read with its type and range checked.

    A value of `null` counts as absent, as it does for transformers' own defaults.
    """

    def __init__(self, raw: Mapping[str, Any], *, where: str) -> None:
        self.raw = raw
        self.where = where

    def _value(self, name: str, default: Any) -> Any:
        value = self.raw.get(name)
        if value is None:
            if default is _REQUIRED:
                raise ConfigError(f"{self.where}: the field '{name}' is missing")
            return default
        return value

    def one_of(self, *names: str) -> str:
        """Whichever of several names of one field the configuration uses; the first if it uses none.

        Raises:
            ConfigError: Two of them are present and disagree.
        """
        present = [name for name in names if self.raw.get(name) is not None] or [names[0]]
        for other in present[1:]:
            if self.raw[other] != self.raw[present[0]]:
                raise ConfigError(
                    f"{self.where}: the fields '{present[0]}' ({shorten(self.raw[present[0]])}) and "
                    f"'{other}' ({shorten(self.raw[other])}) name the same thing and must be equal"
                )
        return present[0]

    def refuse(self, name: str, reason: str) -> None:
        """Check that the switch `name` is absent or false; `reason` completes `because`."""
        if self.boolean(name, False):
            raise ConfigError(f"{self.where}: the field '{name}' must be false, got true, because {reason}")

    def integer(self, name: str, default: Any = _REQUIRED, *, low: int = 1, high: int = MAX_WIDTH) -> Any:
        """The integer field `name`, between `low` and `high`; `default` (which may be None) if it is absent."""
        value = self._value(name, default)
        if value is default:
            return value
        if type(value) is not int:
            raise ConfigError(f"{self.where}: the field '{name}' must be an integer, got {shorten(value)}")
        if not low <= value <= high:
            raise ConfigError(
                f"{self.where}: the field '{name}' must be between {low} and {high}, got {shorten(value)}"
            )
        return value

    def boolean(self, name: str, default: Any = _REQUIRED) -> Any:
        """The field `name`, which must be true or false."""
        value = self._value(name, default)
        if type(value) is not bool and value is not default:
            raise ConfigError(f"{self.where}: the field '{name}' must be true or false, got {shorten(value)}")
        return value

    def number(self, name: str, default: Any = _REQUIRED, *, low: float = 0.0, high: float = 1e9) -> Any:
        """The field `name`, an integer or a finite float between `low` and `high`."""
        value = self._value(name, default)
        if value is default:
            return value
        if type(value) not in (int, float) or not low <= value <= high:
            raise ConfigError(
                f"{self.where}: the field '{name}' must be a number between {low:g} and {high:g}, got {shorten(value)}"
            )
        return value

    def text(self, name: str, default: Any = _REQUIRED, *, allowed: tuple[str, ...] = ()) -> Any:
        """The field `name`, a string, one of `allowed` where given."""
        value = self._value(name, default)
        if value is default:
            return value
        if type(value) is not str:
            raise ConfigError(f"{self.where}: the field '{name}' must be a string, got {shorten(value)}")
        if allowed and value not in allowed:
            raise ConfigError(
                f"{self.where}: the field '{name}' must be one of {', '.join(allowed)}, got {shorten(value)}"
            )
        return value

    def mapping(self, name: str) -> Mapping[str, Any]:
        """The field `name`, an object; empty if it is absent."""
        value = self._value(name, None)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise ConfigError(f"{self.where}: the field '{name}' must be an object, got {shorten(value)}")
        return value

    def section(self, name: str) -> Fields:
        """The fields of the object `name`, empty if it is absent; its errors say where it lies."""
        return Fields(self.mapping(name), where=f"{self.where}, in '{name}'")

    def filled(self, **defaults: Any) -> Fields:
        """The same fields with defaults for those that are absent; a `null` stays a `null`."""
        return Fields({**defaults, **self.raw}, where=self.where)

    def integers(self, name: str, default: Any = _REQUIRED, *, low: int = 0, high: int = MAX_WIDTH) -> Any:
        """The field `name`, a list of integers between `low` and `high`, as a tuple."""
        value = self._value(name, default)
        if value is default:
            return value
        if type(value) is not list or not all(type(entry) is int and low <= entry <= high for entry in value):
            raise ConfigError(
                f"{self.where}: the field '{name}' must be a list of integers between {low} and {high}, "
                f"got {shorten(value)}"
            )
        return tuple(value)

    def names(self, name: str, default: Any = _REQUIRED, *, allowed: tuple[str, ...], length: int) -> Any:
        """The field `name`, a list of `length` strings, each one of `allowed`, as a tuple."""
        value = self._value(name, default)
        if value is default:
            return value
        if type(value) is not list or len(value) != length:
            raise ConfigError(
                f"{self.where}: the field '{name}' must be a list of {length} names, got {shorten(value)}"
            )
        for entry in value:
            if type(entry) is not str or entry not in allowed:
                raise ConfigError(
                    f"{self.where}: the field '{name}' must hold only {', '.join(allowed)}, got {shorten(entry)}"
                )
        return tuple(value)

    def divides(self, name: str, divisor: int, total_name: str, total: int) -> None:
        """Check that `divisor` (the value of `name`) divides `total` (the value of `total_name`)."""
        if total % divisor:
            raise ConfigError(f"{self.where}: the field '{name}' ({divisor}) must divide '{total_name}' ({total})")
