"""The errors a person can meet, each one sentence long."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OptplanError(Exception):
    """Any failure that optplan reports to its user as one sentence."""


class ConfigError(OptplanError):
    """The user's input is at fault: a name, a number, a file or a combination of flags."""


class DataError(OptplanError):
    """One of optplan's own data tables is at fault."""


def shorten(value: object, *, limit: int = 60) -> str:
    """Show a value from outside in at most `limit` characters, quoted and safe to print."""
    text = ascii(value) if not isinstance(value, str) else ascii(value[: limit + 1])
    return text if len(text) <= limit else text[: limit - 4] + "..." + text[-1]


def printable(text: str) -> str:
    """Text from outside with `?` for whatever could move a terminal's cursor or change its colours."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def unknown(kind: str, value: str, known: Iterable[str], *, more: str = "") -> ConfigError:
    """Build the error for a name that is in no table, with the nearest names that are.

    Args:
        kind: What the name was meant to be, such as `model`.
        value: The name received.
        known: Every name that would have been accepted.
        more: What to do to see the rest, such as ``run `optplan gpus` for the list``.
    """
    names = list(dict.fromkeys(known))
    near = difflib.get_close_matches(value.lower()[:100], names, n=3, cutoff=0.5)
    if near:
        hint = f"nearest: {', '.join(near)}"
    elif len(names) <= 12:
        hint = f"known: {', '.join(names)}"
    else:
        hint = f"known: {', '.join(names[:4])} and {len(names) - 4} more"
    return ConfigError(f"unknown {kind} {shorten(value)}; {hint}" + (f"; {more}" if more else ""))
