"""Options of an optimizer as data: what `--set key=value` may say, and how it is read."""

from __future__ import annotations

import math
import re
from typing import Literal

import msgspec

from optplan.planner.errors import ConfigError, shorten

OptionType = Literal["integer", "number", "boolean", "text"]
OptionValue = int | float | bool | str | None


class Option(msgspec.Struct, frozen=True):
    """One option that changes what an optimizer keeps, allocates or moves.

    Attributes:
        name: Key of `--set key=value`.
        type: What a value must be; the words of `choices` are accepted besides.
        default: Value when the user gives none; None if it follows from the model (`OptimizerModel.bind`).
        help: One line for people, without a full stop.
        low: Smallest number allowed, inclusive unless `low_exclusive`.
        high: Largest number allowed, inclusive unless `high_exclusive`.
        low_exclusive: Whether `low` itself is refused.
        high_exclusive: Whether `high` itself is refused.
        choices: Words accepted: all of them for `text`, beside the numbers for `integer` and `number`.
    """

    name: str
    type: OptionType
    default: OptionValue
    help: str
    low: float | None = None
    high: float | None = None
    low_exclusive: bool = False
    high_exclusive: bool = False
    choices: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        """What a value may be, in words: `an integer from 1 to 1000`."""
        if self.type == "boolean":
            return "true or false"
        kinds = {"integer": "an integer", "number": "a number"}
        numbers = [kinds[self.type] + self._range()] if self.type in kinds else []
        *others, last = [*self.choices, *numbers]
        return f"{', '.join(others)} or {last}" if others else last

    def _range(self) -> str:
        above = "" if self.low is None else f" {'above' if self.low_exclusive else 'from'} {self.low:.15g}"
        below = "" if self.high is None else f" {'below' if self.high_exclusive else 'to'} {self.high:.15g}"
        return above + below

    def parse(self, value: object, *, owner: str) -> OptionValue:
        """Read a value, given as text or already of its type.

        Args:
            value: Text from the command line, or an int, float, bool or word from the library.
            owner: Name of the optimizer, for the error.

        Raises:
            ConfigError: The value is not of the option's type, or out of its range.
        """
        parsed = self._read(value)
        if parsed is None:
            raise ConfigError(f"{owner}: {self.name} must be {self.allowed}, got {shorten(value)}")
        return parsed

    def _read(self, value: object) -> OptionValue:
        if not isinstance(value, bool) and str(value) in self.choices:
            return str(value)
        if self.type == "boolean":
            return value if isinstance(value, bool) else {"true": True, "false": False}.get(str(value))
        if self.type == "text" or isinstance(value, bool):
            return None
        number = _integer(value) if self.type == "integer" else _number(value)
        return number if number is not None and self._contains(number) else None

    def _contains(self, number: float) -> bool:
        if self.low is not None and (number < self.low or (self.low_exclusive and number == self.low)):
            return False
        if self.high is None:
            return True
        return number < self.high or (number == self.high and not self.high_exclusive)


def _integer(value: object) -> int | None:
    if isinstance(value, int):
        return value
    return int(value) if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", value) else None


def _number(value: object) -> float | None:
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]*\.?[0-9]+([eE][+-]?[0-9]{1,3})?", value[:40]):
        value = float(value[:40])
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return None
