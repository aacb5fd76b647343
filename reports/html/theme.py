"""The one theme: every colour in its light and its dark form, and the layout that all figures share.

Figures name colours as `var(--parameters)`; the page's script puts in the value of the scheme that is shown, and draws
them again when it changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from optplan.planner.timeline import Category

INTERFACE: dict[str, tuple[str, str]] = {
    "page": ("#f7f6f3", "#121419"),
    "card": ("#ffffff", "#1a1d24"),
    "sunken": ("#f1efea", "#222630"),
    "ink": ("#1b1d22", "#eceae6"),
    "muted": ("#565b66", "#a9afbb"),
    "line": ("#dedad2", "#343945"),
    "grid": ("#ebe8e2", "#2a2f39"),
    "accent": ("#2f4fa8", "#9db4ff"),
    "on-accent": ("#ffffff", "#10131a"),
    "good": ("#176b3c", "#74d79c"),
    "good-soft": ("#e3f2e8", "#17301f"),
    "bad": ("#ab2419", "#ff9a90"),
    "bad-soft": ("#fbe7e4", "#3a1b19"),
    "limit": ("#ab2419", "#ff9a90"),
}
"""Name to its colour in the light and in the dark scheme."""

CATEGORIES: dict[Category, tuple[str, str]] = {
    "parameters": ("#3d5fb8", "#7f9ff0"),
    "gradients": ("#3a9c9c", "#58c4c4"),
    "master_weights": ("#86a9e3", "#b4cdf8"),
    "optimizer_state": ("#a63d85", "#dd7fc0"),
    "optimizer_temporaries": ("#dc9cc6", "#f3c6e3"),
    "activations": ("#3f8a50", "#71c283"),
    "logits_and_loss": ("#9bbf58", "#c8e08d"),
    "communication": ("#cf8420", "#f0b055"),
    "workspace": ("#8b8e97", "#a5a9b4"),
    "unexplained": ("#c6474f", "#f08a90"),
}
"""The same for what memory is for."""

SERIES = (
    ("#2f4fa8", "#9db4ff"),
    ("#b5531c", "#f2a36b"),
    ("#1f7a6d", "#63cdbd"),
    ("#a63d85", "#dd7fc0"),
    ("#6a7d1d", "#bccf62"),
    ("#5b4bb0", "#b7a8ff"),
    ("#8a6a10", "#e2c25e"),
    ("#5c626e", "#b0b6c2"),
)
"""The same for lines that stand for records, optimizers or models, in the order of their appearance."""

DASHES = ("solid", "dash", "dot", "dashdot")
FONT = 'ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif'
MONOSPACE = 'ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "Liberation Mono", monospace'


def variables(*, dark: bool) -> str:
    """The colours of one scheme as declarations of CSS custom properties."""
    pairs = dict(INTERFACE)
    pairs |= {name.replace("_", "-"): pair for name, pair in CATEGORIES.items()}
    pairs |= {f"series-{index}": pair for index, pair in enumerate(SERIES)}
    return "".join(f"--{name}:{pair[dark]};" for name, pair in pairs.items())


def variable(name: str) -> str:
    """A colour of `INTERFACE` or `CATEGORIES` as a figure names it."""
    return f"var(--{name.replace('_', '-')})"


def series(index: int) -> str:
    """The colour of the line with this index."""
    return f"var(--series-{index % len(SERIES)})"


def axis(**more: Any) -> dict[str, Any]:
    """An axis with the shared lines and fonts, and what a figure adds to them."""
    return {
        "gridcolor": variable("grid"),
        "zerolinecolor": variable("line"),
        "linecolor": variable("line"),
        "tickfont": {"color": variable("muted"), "size": 12},
        "automargin": True,
        "fixedrange": True,
        **more,
    }


def titled(text: str) -> dict[str, Any]:
    """An axis title."""
    return {"text": text, "font": {"color": variable("muted"), "size": 12}, "standoff": 10}


def layout(*, height: int, **more: Any) -> dict[str, Any]:
    """The layout that all figures share, with what one adds; with `showlegend` the page itself lists the traces."""
    return {
        "height": height,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 13, "color": variable("ink")},
        "margin": {"l": 8, "r": 16, "t": 16, "b": 8},
        "hoverlabel": {
            "bgcolor": variable("card"),
            "bordercolor": variable("line"),
            "font": {"family": FONT, "size": 13, "color": variable("ink")},
            "align": "left",
        },
        "showlegend": False,
        "dragmode": False,
        **more,
    }


def log_axis(title: str, values: Iterable[float]) -> dict[str, Any]:
    """A logarithmic axis over these values, marked at 1, 2 and 5 of each power of ten."""
    positive = [value for value in values if value > 0] or [1.0]
    powers = range(math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive))) + 1)
    ticks = [step * 10**power for power in powers for step in (1, 2, 5)]
    return axis(
        type="log",
        title=titled(f"{title}, logarithmic"),
        range=[math.log10(min(positive) * 0.8), math.log10(max(positive) * 1.25)],
        tickvals=ticks,
        ticktext=[f"{tick:,.10g}" for tick in ticks],
        zeroline=False,
    )


def limit_line(gib: float, label: str) -> dict[str, Any]:
    """Layout of a horizontal line that marks a limit in GiB, with its name above its right end."""
    return {
        "shapes": [{
            "type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": gib, "y1": gib,
            "line": {"color": variable("limit"), "width": 2, "dash": "dash"},
        }],
        "annotations": [{
            "text": f"{label} {gib:.2f} GiB", "xref": "paper", "x": 1, "xanchor": "right", "y": gib,
            "yanchor": "bottom", "showarrow": False, "font": {"color": variable("limit"), "size": 12},
        }],
    }  # fmt: skip
