"""The errors of every estimator on the same measured steps."""

from __future__ import annotations

import math
from typing import Any

from optplan.planner.rivals import RivalAnswer, Rivals, RivalTool
from optplan.reports.html import theme
from optplan.reports.html.figures.plot import Figure, Trace, scatter
from optplan.reports.html.text import plain

_TICKS = (-80, -50, 0, 100, 300)
"""Marks of the axis in percent: half and double are equally far from the middle."""


def rival_errors(rivals: Rivals) -> Figure:
    """A row an estimator, a point a step: predicted over measured peak, the most exact estimator on top."""
    tools = list(reversed(rivals.tools))
    places = list(range(len(tools)))
    return Figure(
        data=[
            _points(rivals, tools, nearest=False),
            _points(rivals, tools, nearest=True),
            _medians(rivals, tools),
        ],
        layout=theme.layout(
            height=120 + 44 * len(tools),
            showlegend=True,
            hovermode="closest",
            margin={"l": 8, "r": 16, "t": 12, "b": 8},
            xaxis=theme.axis(
                title=theme.titled("% error, by ratio"),
                tickvals=[_place(mark / 100) for mark in _TICKS],
                ticktext=[f"{mark:+d}" if mark else "0" for mark in _TICKS],
                tickangle=0,
                zerolinewidth=2,
            ),
            yaxis=theme.axis(
                tickvals=places,
                ticktext=[plain(tool.title) for tool in tools],
                tickfont={"color": theme.variable("ink"), "size": 12},
                range=[-0.6, len(tools) - 0.4],
                showgrid=True,
            ),
        ),
    )  # fmt: skip


def _points(rivals: Rivals, tools: list[RivalTool], *, nearest: bool) -> Trace:
    found = [
        (place, tool, answer)
        for place, tool in enumerate(tools)
        for answer in tool.answers
        if answer.predicted_bytes is not None and answer.is_nearest == nearest
    ]
    colour = theme.variable("muted" if nearest else "accent")
    return scatter(
        name="the nearest step that it can express" if nearest else "the step as it was measured",
        mode="markers",
        x=[_place(_error(rivals, answer)) for _, _, answer in found],
        # Points of one estimator in two or three lines, so that fewer hide each other.
        y=[round(place + (answer.case % 5 - 2) * 0.1, 2) for place, _, answer in found],
        customdata=[_told(rivals, tool, answer) for _, tool, answer in found],
        marker={
            "size": 8, "symbol": "circle-open" if nearest else "circle", "color": colour, "opacity": 0.85,
            "line": {"width": 1.5, "color": colour},
        },
        hovertemplate=(
            "<b>%{customdata[0]}</b>, %{customdata[1]}<br>predicted %{customdata[2]:,} bytes,"
            " measured %{customdata[3]:,}<br>%{customdata[4]:+.1%} %{customdata[5]}<extra></extra>"
        ),
    )  # fmt: skip


def _medians(rivals: Rivals, tools: list[RivalTool]) -> Trace:
    errors = [sorted(rivals.errors(tool)) for tool in tools]
    middle = [(row[(len(row) - 1) // 2] + row[len(row) // 2]) / 2 for row in errors]
    return scatter(
        name="median of its errors, with sign",
        mode="markers",
        x=[_place(error) for error in middle],
        y=list(range(len(tools))),
        customdata=middle,
        marker={"symbol": "line-ns-open", "size": 26, "color": theme.variable("ink"), "line": {"width": 2}},
        hovertemplate="median %{customdata:+.1%}<extra></extra>",
    )


def _error(rivals: Rivals, answer: RivalAnswer) -> float:
    assert answer.predicted_bytes is not None
    return answer.predicted_bytes / rivals.cases[answer.case].measured_peak_bytes - 1


def _place(error: float) -> float:
    """Where an error lies on the axis: the logarithm of predicted over measured."""
    return round(math.log2(1 + error), 5)


def _told(rivals: Rivals, tool: RivalTool, answer: RivalAnswer) -> list[Any]:
    case = rivals.cases[answer.case]
    return [
        plain(tool.title), plain(f"{case.model}: {case.setting}"), answer.predicted_bytes, case.measured_peak_bytes,
        _error(rivals, answer), f"<br>{plain(answer.note)}" if answer.note else "",
    ]  # fmt: skip
