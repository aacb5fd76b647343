"""Values as text: for cells of tables, and for plotly, which takes its strings for markup."""

from __future__ import annotations

import html
from collections.abc import Callable

from optplan.planner.errors import printable
from optplan.planner.units import GIB, format_bytes
from optplan.reports.html.parts import Kind, Value

MISSING = "–"


def plain(text: str) -> str:
    """Text from outside as plotly shows it letter for letter."""
    return html.escape(printable(text), quote=False)


def gib(num_bytes: float) -> float:
    """Bytes as a number of GiB for an axis, to a KiB; the exact bytes go along as the figure's custom data."""
    return round(num_bytes / GIB, 6)


def shown(value: Value, kind: Kind) -> str:
    """A value as a cell shows it."""
    if value is None:
        return MISSING
    if isinstance(value, str):
        return printable(value)
    return _FORMATS[kind](value)


def percent(value: float, *, digits: int = 2, signed: bool = False) -> str:
    """A share in percent, with a real minus."""
    sign = ("+" if value > 0 else "−") if signed and value else ""
    return f"{sign}{abs(value) * 100:.{digits}f} %"


def sentence(text: str) -> str:
    """Text as a sentence: what begins with a word, not a name, with a capital, and with a full stop at its end."""
    first = text.split(" ", 1)[0]
    begun = text[:1].upper() + text[1:] if first.rstrip(",:").isalpha() else text
    return begun if begun.endswith((".", "!", "?")) or not begun else f"{begun}."


def exact(value: Value, kind: Kind) -> str:
    """A value with all its digits, for the tooltip; empty where the cell shows them already."""
    if value is None or isinstance(value, str) or "bytes" not in kind:
        return ""
    return f"{int(value):,} bytes"


def _signed_bytes(value: float) -> str:
    if not value:
        return "equal"
    return ("+" if value > 0 else "−") + format_bytes(abs(int(value)))


def _signed_percent(value: float) -> str:
    if not value:
        return percent(0, digits=0)
    return percent(value, digits=3, signed=True) if abs(value) >= 5e-6 else "below 0.001 %"


def _error(value: float) -> str:
    if not value:
        return percent(0, digits=0)
    if abs(value) < 5e-6:
        return "below 0.001 %"
    return percent(value, digits=3 if abs(value) < 0.001 else 2 if abs(value) < 0.1 else 1)


def _duration(seconds: float) -> str:
    if seconds >= 60:
        return f"{seconds / 60:,.1f} min"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


_FORMATS: dict[Kind, Callable[[float], str]] = {
    "text": str,
    "code": str,
    "bytes": lambda value: f"{value / GIB:,.2f}",
    "signed_bytes": _signed_bytes,
    "int": lambda value: f"{int(value):,}",
    "percent": lambda value: percent(value, digits=0),
    "error": _error,
    "signed_percent": _signed_percent,
    "duration": _duration,
    "milliseconds": lambda value: f"{value * 1000:,.2f}",
    "decimal": lambda value: f"{value:,.3f}",
    "number": lambda value: f"{value:,.4g}",
}
