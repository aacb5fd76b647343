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

    def integer(self, name: str, default: Any = _REQUIRED, *, low: int = 1, high: int = MAX_WIDTH) -> Any:
        """The integer field `name`, between `low` and `high`; `default` (which may be None) if it is absent."""
        value = self._value(name, default)
        if value is default:
            return value
        if type(value) is not int:
            raise ConfigError(f"{self.where}: the field '{name}' must be an integer, got {shorten(value)}")
        if not low <= value <= high:
            raise ConfigError(f"{self.where}: the field '{name}' must be between {low} and {high}, got {shorten(value)}")
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

    def divides(self, name: str, divisor: int, total_name: str, total: int) -> None:
        """Check that `divisor` (the value of `name`) divides `total` (the value of `total_name`)."""
        if total % divisor:
            raise ConfigError(
                f"{self.where}: the field '{name}' ({divisor}) must divide '{total_name}' ({total})"
            )
