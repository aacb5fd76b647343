"""Predicted against measured, and the errors of the predictions."""

from __future__ import annotations

from collections.abc import Sequence

from optplan.planner.accuracy import AccuracyRow
from optplan.reports.html import theme
from optplan.reports.html.figures.plot import Figure, Trace, boxes, scatter
from optplan.reports.html.text import gib, plain

BAND = 0.01
"""The band that is drawn around equality: 1 %."""

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")


def agreement(rows: Sequence[AccuracyRow]) -> Figure:
    """Predicted peaks against measured ones on logarithmic axes, with equality and the band around it."""
    kinds = list(dict.fromkeys(row.precision for row in rows))
    sizes = [gib(size) for row in rows for size in (row.measured_peak_bytes, row.predicted_peak_bytes or 0) if size]
    low, high = min(sizes) * 0.85, max(sizes) * 1.15
    return Figure(
        data=[*_band(low, high), *(_points(rows, kind, index) for index, kind in enumerate(kinds))],
        layout=theme.layout(
            height=520,
            showlegend=True,
            hovermode="closest",
            margin={"l": 8, "r": 16, "t": 8, "b": 8},
            xaxis=theme.log_axis("GiB measured, peak allocated", sizes),
            yaxis=theme.log_axis("GiB predicted", sizes),
        ),
    )  # fmt: skip


def residuals(rows: Sequence[AccuracyRow]) -> Figure:
    """The errors against the measured size: where the band is wide enough to be seen."""
    kinds = list(dict.fromkeys(row.precision for row in rows))
    traces = []
    for index, kind in enumerate(kinds):
        trace = _points(rows, kind, index)
        trace["y"] = [
            100 * (row.peak_error or 0) for row in rows if row.precision == kind and row.peak_error is not None
        ]
        traces.append(trace)
    return Figure(
        data=traces,
        layout=theme.layout(
            height=360,
            showlegend=True,
            hovermode="closest",
            xaxis=theme.log_axis("GiB measured, peak allocated", [gib(row.measured_peak_bytes) for row in rows]),
            yaxis=theme.axis(title=theme.titled("% error"), zerolinewidth=2),
            shapes=[{
                "type": "rect", "xref": "paper", "x0": 0, "x1": 1, "y0": -100 * BAND, "y1": 100 * BAND,
                "fillcolor": theme.variable("good-soft"), "line": {"width": 0}, "layer": "below",
            }],
        ),
    )  # fmt: skip


def error_boxes(groups: dict[str, list[float]], *, what: str) -> Figure:
    """The errors of each group: every point, its median and quartiles; the band is shaded."""
    return Figure(
        data=[
            boxes(
                name=plain(name),
                x=[100 * error for error in errors],
                customdata=errors,
                boxpoints="all",
                jitter=0.5,
                pointpos=0,
                fillcolor="rgba(0,0,0,0)",
                line={"color": theme.variable("muted"), "width": 1},
                marker={"color": theme.variable("accent"), "size": 5, "opacity": 0.7},
                hovertemplate="<b>%{y}</b><br>%{x:+.3f} %<extra></extra>",
            )
            for name, errors in reversed(groups.items())
        ],
        layout=theme.layout(
            height=80 + 26 * len(groups),
            margin={"l": 8, "r": 16, "t": 12, "b": 8},
            xaxis=theme.axis(title=theme.titled(f"% error, {what}"), zerolinewidth=2),
            yaxis=theme.axis(tickfont={"color": theme.variable("ink"), "size": 12}),
            shapes=[{
                "type": "rect", "x0": -100 * BAND, "x1": 100 * BAND, "y0": 0, "y1": 1, "yref": "paper",
                "fillcolor": theme.variable("good-soft"), "line": {"width": 0}, "layer": "below",
            }],
        ),
    )  # fmt: skip


def _band(low: float, high: float) -> list[Trace]:
    return [
        scatter(
            name="within 1 %", x=[low, high, high, low], y=[low * (1 - BAND), high * (1 - BAND), high * (1 + BAND),
            low * (1 + BAND)], mode="lines", fill="toself", line={"width": 0}, fillcolor=theme.variable("good-soft"),
            hoverinfo="skip",
        ),
        scatter(
            name="equal", x=[low, high], y=[low, high], mode="lines", hoverinfo="skip",
            line={"color": theme.variable("muted"), "width": 1, "dash": "dot"},
        ),
    ]  # fmt: skip


def _points(rows: Sequence[AccuracyRow], precision: str, index: int) -> Trace:
    mine = [row for row in rows if row.precision == precision and row.predicted_peak_bytes is not None]
    return scatter(
        name=plain(precision),
        x=[gib(row.measured_peak_bytes) for row in mine],
        y=[gib(row.predicted_peak_bytes or 0) for row in mine],
        customdata=[[row.measured_peak_bytes, row.predicted_peak_bytes, plain(f"{row.model}: {row.setting}"),
                     row.peak_error] for row in mine],
        mode="markers",
        marker={
            "size": 9,
            "color": theme.series(index),
            "symbol": _SYMBOLS[index % len(_SYMBOLS)],
            "line": {"width": 1, "color": theme.variable("card")},
        },
        hovertemplate=(
            "%{customdata[2]}<br>measured %{customdata[0]:,} bytes"
            "<br>predicted %{customdata[1]:,} bytes<br>%{customdata[3]:+.3%}<extra></extra>"
        ),
    )  # fmt: skip
