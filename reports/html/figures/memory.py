"""Stacked bars: what is alive at the peak, against the usable memory of the GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optplan.planner.records import Estimate, GpuRow
from optplan.planner.timeline import Category
from optplan.reports.html import theme
from optplan.reports.html.figures.plot import Figure, bars
from optplan.reports.html.text import gib, plain
from optplan.reports.labels import CATEGORY_NAMES

_HOVER = "<b>%{fullData.name}</b><br>%{customdata:,} bytes · %{x:.2f} GiB<extra>%{y}</extra>"


def memory_bar(categories: Mapping[Category, int], *, reserved_bytes: int | None, gpu: GpuRow) -> Figure:
    """One configuration's peak as a bar, with what the allocator holds beyond it, on the scale of the whole GPU."""
    peak = sum(categories.values())
    traces = [_segment(category, [""], [categories.get(category, 0)]) for category in CATEGORY_NAMES]
    traces = [trace for trace in traces if trace["customdata"][0]]
    if reserved_bytes is not None and reserved_bytes > peak:
        traces.append(_cached(reserved_bytes - peak))
    most = max(gpu.total_bytes, reserved_bytes or 0, peak)
    return Figure(
        data=[bars(**trace) for trace in traces],
        layout=theme.layout(
            height=140,
            barmode="stack",
            showlegend=True,
            margin={"l": 8, "r": 24, "t": 30, "b": 8},
            xaxis=theme.axis(range=[0, gib(most) * 1.02], ticksuffix=" GiB"),
            yaxis=theme.axis(visible=False),
            shapes=[_limit(gpu.usable_bytes)],
            annotations=[_limit_label(gpu.usable_bytes, most)],
        ),
    )  # fmt: skip


def optimizer_bars(rows: Sequence[Estimate], *, gpu: GpuRow, chosen: str | None) -> Figure:
    """Every optimizer's peak by category, the smallest on top."""
    ordered = sorted(rows, key=lambda row: -(row.peak_allocated_bytes or 0))
    names = [plain(row.optimizer) for row in ordered]
    traces = []
    for category in CATEGORY_NAMES:
        sizes = [(row.peak_categories or {}).get(category, 0) for row in ordered]
        if any(sizes):
            traces.append(_segment(category, names, sizes))
    most = max(gpu.usable_bytes, *(row.peak_allocated_bytes or 0 for row in rows))
    bold = [f"<b>{name}</b>" if row.optimizer == chosen else name for row, name in zip(ordered, names, strict=True)]
    return Figure(
        data=[bars(**trace) for trace in traces],
        layout=theme.layout(
            height=76 + 26 * len(rows),
            barmode="stack",
            bargap=0.34,
            showlegend=True,
            margin={"l": 8, "r": 24, "t": 34, "b": 8},
            xaxis=theme.axis(range=[0, gib(most) * 1.04], title=theme.titled("GiB, allocated at the peak")),
            yaxis=theme.axis(tickvals=names, ticktext=bold, tickfont={"color": theme.variable("ink"), "size": 12}),
            shapes=[_limit(gpu.usable_bytes)],
            annotations=[_limit_label(gpu.usable_bytes, most)],
        ),
    )  # fmt: skip


def switch_bar(*, most_bytes: int) -> Figure:
    """An empty bar whose segments the page sets to one answer of its grid."""
    traces = [_segment(category, [""], [0]) for category in CATEGORY_NAMES]
    return Figure(
        data=[bars(**trace) for trace in traces],
        layout=theme.layout(
            height=130,
            barmode="stack",
            margin={"l": 8, "r": 24, "t": 40, "b": 8},
            xaxis=theme.axis(range=[0, gib(most_bytes) * 1.02], title=theme.titled("GiB, allocated at the peak")),
            yaxis=theme.axis(visible=False),
            shapes=[_limit(0)],
            annotations=[_limit_label(0, most_bytes)],
        ),
    )


def _segment(category: Category, names: Sequence[str], sizes: Sequence[int]) -> dict[str, Any]:
    return {
        "name": CATEGORY_NAMES[category],
        "meta": category,
        "orientation": "h",
        "x": [gib(size) for size in sizes],
        "y": list(names),
        "customdata": list(sizes),
        "hovertemplate": _HOVER,
        "marker": {"color": theme.variable(category), "line": {"width": 1, "color": theme.variable("card")}},
    }


def _cached(num_bytes: int) -> dict[str, Any]:
    return {
        "name": "reserved beyond the peak",
        "orientation": "h",
        "x": [gib(num_bytes)],
        "y": [""],
        "customdata": [num_bytes],
        "hovertemplate": _HOVER,
        "marker": {
            "color": theme.variable("sunken"),
            "pattern": {"shape": "/", "fgcolor": theme.variable("muted"), "size": 6, "solidity": 0.2},
            "line": {"width": 1, "color": theme.variable("card")},
        },
    }


def _limit(usable_bytes: int) -> dict[str, Any]:
    return {
        "type": "line",
        "x0": gib(usable_bytes),
        "x1": gib(usable_bytes),
        "y0": 0,
        "y1": 1,
        "yref": "paper",
        "line": {"color": theme.variable("limit"), "width": 2, "dash": "dash"},
    }


def _limit_label(usable_bytes: int, most_bytes: int) -> dict[str, Any]:
    return {
        "text": f"usable {gib(usable_bytes):.2f} GiB",
        "x": gib(usable_bytes),
        "y": 1,
        "yref": "paper",
        "yanchor": "bottom",
        "xanchor": "right" if usable_bytes > most_bytes / 2 else "left",
        "showarrow": False,
        "font": {"color": theme.variable("limit"), "size": 12},
    }
