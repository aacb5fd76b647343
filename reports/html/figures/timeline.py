"""Memory over the step: allocated bytes by category after each event, the peak marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from optplan.planner.step_history import PhaseSpan
from optplan.planner.timeline import Category
from optplan.planner.timeline_report import CurvePoint
from optplan.reports.html import theme
from optplan.reports.html.figures.plot import Figure, Trace, scatter
from optplan.reports.html.text import gib, plain
from optplan.reports.labels import CATEGORY_NAMES


def step_timeline(
    points: Sequence[CurvePoint], phases: Sequence[PhaseSpan], *, peak_event: int, usable_bytes: int | None = None
) -> Figure:
    """The step as stacked areas; hovering names what each event allocates or frees."""
    events = [point.event for point in points]
    traces = [
        _area(category, events, [point.categories.get(category, 0) for point in points])
        for category in CATEGORY_NAMES
        if any(point.categories.get(category) for point in points)
    ]
    peak = next(point for point in points if point.event == peak_event)
    most = max(point.allocated_bytes for point in points)
    near = usable_bytes is not None and usable_bytes < 1.6 * most
    return Figure(
        data=[*traces, _outline(points), _peak(peak, late=events.index(peak_event) > len(events) / 2)],
        layout=theme.layout(
            height=400,
            showlegend=True,
            hovermode="closest",
            hoverdistance=60,
            margin={"l": 8, "r": 16, "t": 34, "b": 8},
            xaxis=theme.axis(title=theme.titled("allocations and frees, in their order"), showgrid=False),
            yaxis=theme.axis(title=theme.titled("GiB, allocated"), range=[0, gib(usable_bytes if near and usable_bytes
                             and usable_bytes > most else most) * 1.08]),
            shapes=[*_bands(phases), *([_limit(usable_bytes)] if near and usable_bytes else [])],
            annotations=_labels(phases),
        ),
    )  # fmt: skip


def _area(category: Category, events: Sequence[int], sizes: Sequence[int]) -> Trace:
    return scatter(
        name=CATEGORY_NAMES[category],
        meta=category,
        x=list(events),
        y=[gib(size) for size in sizes],
        mode="lines",
        line={"width": 0, "shape": "hv", "color": theme.variable(category)},
        fillcolor=theme.variable(category),
        stackgroup="categories",
        hoverinfo="skip",
    )


def _outline(points: Sequence[CurvePoint]) -> Trace:
    return scatter(
        name="allocated",
        x=[point.event for point in points],
        y=[gib(point.allocated_bytes) for point in points],
        customdata=[[point.allocated_bytes, point.phase, plain(point.name)] for point in points],
        mode="lines",
        line={"width": 1.2, "shape": "hv", "color": theme.variable("ink")},
        hovertemplate=(
            "event %{x:,}, %{customdata[1]}<br>%{customdata[2]}<br>"
            "%{y:.3f} GiB · %{customdata[0]:,} bytes<extra></extra>"
        ),
        showlegend=False,
    )


def _peak(point: CurvePoint, *, late: bool) -> Trace:
    return scatter(
        name="peak",
        x=[point.event],
        y=[gib(point.allocated_bytes)],
        customdata=[[point.allocated_bytes, point.phase, plain(point.name)]],
        text=[f"peak {gib(point.allocated_bytes):.2f} GiB"],
        textposition="top left" if late else "top right",
        textfont={"size": 12, "color": theme.variable("ink")},
        mode="markers+text",
        cliponaxis=False,
        marker={
            "size": 11,
            "color": theme.variable("limit"),
            "line": {"width": 2, "color": theme.variable("card")},
        },
        hovertemplate="peak, in %{customdata[1]}<br>%{customdata[2]}<br>%{customdata[0]:,} bytes<extra></extra>",
        showlegend=False,
    )


def _bands(phases: Sequence[PhaseSpan]) -> list[dict[str, Any]]:
    return [
        {
            "type": "rect", "x0": span.first_event - 1, "x1": span.last_event, "y0": 0, "y1": 1, "yref": "paper",
            "fillcolor": theme.variable("sunken"), "line": {"width": 0}, "layer": "below",
        }
        for span in phases[::2]
    ]  # fmt: skip


def _labels(phases: Sequence[PhaseSpan]) -> list[dict[str, Any]]:
    whole = phases[-1].last_event - phases[0].first_event + 1
    return [
        {
            "text": span.phase, "x": (span.first_event + span.last_event) / 2, "y": 1, "yref": "paper",
            "yanchor": "bottom", "showarrow": False, "font": {"size": 12, "color": theme.variable("muted")},
        }
        for span in phases
        if (span.last_event - span.first_event + 1) / whole > 0.06
    ]  # fmt: skip


def _limit(usable_bytes: int) -> dict[str, Any]:
    return {
        "type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": gib(usable_bytes), "y1": gib(usable_bytes),
        "line": {"color": theme.variable("limit"), "width": 2, "dash": "dash"},
    }  # fmt: skip
