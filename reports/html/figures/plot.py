"""Figures as plotly's script in the page takes them: traces and a layout.

They are written as the script's own JSON. plotly's Python classes would say the same more slowly, a quarter of a second
for a page; the tests hold every figure against them.
"""

from __future__ import annotations

from typing import Any

import msgspec

Trace = dict[str, Any]
"""A trace's properties, by plotly's names for them."""


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """Traces and the layout they share."""

    data: list[Trace]
    layout: dict[str, Any]


def scatter(**properties: Any) -> Trace:
    """Points or lines."""
    return {"type": "scatter", **properties}


def bars(**properties: Any) -> Trace:
    """Bars."""
    return {"type": "bar", **properties}


def boxes(**properties: Any) -> Trace:
    """Points with their median and quartiles."""
    return {"type": "box", **properties}


def treemap(**properties: Any) -> Trace:
    """Nested tiles."""
    return {"type": "treemap", **properties}
