"""Stacked bars: what is alive at each optimizer's peak, against the GPU's usable memory."""

from __future__ import annotations

from collections.abc import Mapping

from rich.text import Text

from optplan.planner.timeline import Category
from optplan.planner.units import format_gib
from optplan.reports.terminal.console import Glyphs

LABELS: dict[Category, tuple[str, str]] = {
    "parameters": ("parameters", "blue"),
    "gradients": ("gradients", "cyan"),
    "master_weights": ("master weights", "bright_blue"),
    "optimizer_state": ("optimizer state", "magenta"),
    "optimizer_temporaries": ("optimizer temporaries", "bright_magenta"),
    "activations": ("activations", "green"),
    "logits_and_loss": ("logits and loss", "bright_green"),
    "communication": ("communication", "yellow"),
    "workspace": ("workspace", "bright_black"),
    "unexplained": ("unexplained", "red"),
}
"""Category to its name for people and its colour."""


def stacked_bar(
    categories: Mapping[Category, int], *, usable_bytes: int, scale_bytes: int, width: int, glyphs: Glyphs
) -> Text:
    """One bar of at most `width` + 1 columns, with the limit drawn at the usable bytes.

    Args:
        categories: Bytes by category at the peak.
        usable_bytes: Where the limit is drawn.
        scale_bytes: Bytes that `width` columns stand for.
    """
    limit = min(width - 1, round(usable_bytes / scale_bytes * width))
    cells = _cells(categories, scale_bytes=scale_bytes, width=width, glyphs=glyphs)
    cells += [(" ", "")] * (limit + 1 - len(cells))
    cells.insert(limit, (glyphs.limit, "bold red"))
    bar = Text()
    for glyph, style in cells:
        bar.append(glyph, style)
    return bar


def _cells(
    categories: Mapping[Category, int], *, scale_bytes: int, width: int, glyphs: Glyphs
) -> list[tuple[str, str]]:
    cells: list[tuple[str, str]] = []
    total = 0
    for index, (category, (_, colour)) in enumerate(LABELS.items()):
        total += categories.get(category, 0)
        # Ends are rounded, not lengths: the bar as a whole is right to half a column.
        end = round(total / scale_bytes * width)
        cells += [(glyphs.fills[index], colour)] * (end - len(cells))
    return cells


def legend(used: set[Category], *, usable_bytes: int, width: int, glyphs: Glyphs) -> Text:
    """What the glyphs of the bars mean, in lines of at most `width` columns that break between entries only."""
    entries = [
        Text.assemble((glyphs.fills[index], colour), f" {label}")
        for index, (category, (label, colour)) in enumerate(LABELS.items())
        if category in used
    ]
    entries.append(Text.assemble((glyphs.limit, "bold red"), f" usable {format_gib(usable_bytes)}"))
    lines = [Text()]
    for entry in entries:
        if lines[-1].cell_len and lines[-1].cell_len + 2 + entry.cell_len > width:
            lines.append(Text())
        lines[-1] += Text("  " if lines[-1].cell_len else "") + entry
    return Text("\n").join(lines)
