"""Bytes in, bytes out: parsing sizes that people write and showing bytes as GiB."""

from __future__ import annotations

import math
import re

from optplan.planner.errors import ConfigError, shorten

KIB = 2**10
MIB = 2**20
GIB = 2**30

_UNITS = {
    "b": 1,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": 2**40,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
_SIZE = re.compile(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([a-zA-Z]{1,3})\s*\Z")
_MAX_SIZE_BYTES = 2**60


def parse_size(text: str) -> int:
    """Bytes of a size such as `38GiB` (2^30) or `40GB` (10^9).

    Raises:
        ConfigError: The text is not a positive number followed by a unit, or is beyond 1 EiB.
    """
    match = _SIZE.match(text)
    factor = _UNITS.get(match.group(2).lower()) if match else None
    if not match or factor is None:
        hint = "write it like 38GiB (2^30) or 40GB (10^9)"
        raise ConfigError(f"size {shorten(text)} is not a number with a unit; {hint}")
    size = math.floor(float(match.group(1)) * factor)
    if not 0 < size <= _MAX_SIZE_BYTES:
        raise ConfigError(f"size {shorten(text)} is out of range; allowed: above 0 and at most 1024 PiB")
    return size


def format_gib(num_bytes: int, *, digits: int = 2) -> str:
    """Bytes as GiB (2^30), with the unit: `12.55 GiB`."""
    return f"{num_bytes / GIB:.{digits}f} GiB"


def format_bytes(num_bytes: int) -> str:
    """Bytes in the binary unit that leaves one to four digits before the point: `1.50 MiB`."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{num_bytes} B" if unit == "B" else f"{size:,.2f} {unit}"


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple
