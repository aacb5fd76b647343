"""Timelines of several records over each other."""

from __future__ import annotations

from collections.abc import Sequence

from optplan.planner.measured.sides import Side
from optplan.planner.timeline_report import curve
from optplan.reports.html import theme
from optplan.reports.html.figures.plot import Figure, Trace, scatter
from optplan.reports.html.text import gib, plain


def overlay(sides: Sequence[Side]) -> Figure:
    """Allocated bytes after each event, one line a record that holds its events; predictions are dashed."""
    return Figure(
        data=[_line(side, index) for index, side in enumerate(sides) if side.history is not None],
        layout=theme.layout(
            height=420,
            showlegend=True,
            hovermode="closest",
            hoverdistance=60,
            margin={"l": 8, "r": 16, "t": 16, "b": 8},
            xaxis=theme.axis(title=theme.titled("allocations and frees, in their order"), showgrid=False),
            yaxis=theme.axis(title=theme.titled("GiB, allocated"), rangemode="tozero"),
        ),
    )  # fmt: skip


def _line(side: Side, index: int) -> Trace:
    assert side.history is not None
    points = curve(side.history, num_points=600)
    return scatter(
        name=plain(side.label),
        x=[point.event for point in points],
        y=[gib(point.allocated_bytes) for point in points],
        customdata=[[point.allocated_bytes, point.phase, plain(point.name)] for point in points],
        mode="lines",
        line={
            "color": theme.series(index),
            "width": 3 if side.source == "live" else 1.8,
            "dash": "solid" if side.source == "live" else theme.DASHES[1 + index % 3],
            "shape": "hv",
        },
        hovertemplate=(
            "<b>%{fullData.name}</b><br>event %{x:,}, %{customdata[1]}<br>%{customdata[2]}<br>"
            "%{y:.3f} GiB · %{customdata[0]:,} bytes<extra></extra>"
        ),
    )
