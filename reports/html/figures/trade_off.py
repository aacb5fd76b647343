"""Peak memory against time: the front of a search, and what was beaten.

Configurations take different numbers of tokens a step, so that times are for a thousand tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from optplan.planner.search.records import Configuration, SearchReport
from optplan.reports.html import theme
from optplan.reports.html.figures.plot import Figure, Trace, scatter
from optplan.reports.html.text import gib, plain

Point = tuple[Configuration, str]
"""A configuration and what became of it, in words."""

_SURER = "on the front: others need less memory and time, none of them has evidence as sure"


def trade_off(report: SearchReport, points: Sequence[Point]) -> Figure:
    """One point a configuration; the front is joined, the recommendation stands out, reasons are told on hovering."""
    chosen = report.recommendation
    on_front = [found for found in report.front if found.time]
    best = lower_left(on_front)
    surer = [found for found in on_front if found not in best and found != chosen]
    losers = [point for point in points if point[0].time and point[0] not in report.front]
    traces = [
        _trace("beaten", losers, "muted", size=8),
        _trace("on the front by its evidence", [(found, _SURER) for found in surer], "optimizer_state", size=9),
        _trace("on the front", [(found, "on the front") for found in best], "accent", size=11, joined=True),
    ]
    if chosen is not None and chosen.time:
        traces.append(_trace("recommended", [(chosen, "recommended")], "good", size=17))
    return Figure(
        data=traces,
        layout=theme.layout(
            height=460,
            showlegend=True,
            hovermode="closest",
            margin={"l": 8, "r": 24, "t": 16, "b": 8},
            xaxis=theme.log_axis("milliseconds for 1000 tokens", [milliseconds(found) for found, _ in points]),
            yaxis=theme.axis(title=theme.titled("GiB, peak allocated"), rangemode="tozero"),
            **theme.limit_line(gib(report.limit_bytes), "limit"),
        ),
    )  # fmt: skip


def lower_left(points: Sequence[Configuration]) -> list[Configuration]:
    """Those that no other beats in both memory and time, the quickest first."""
    best: list[Configuration] = []
    for found in sorted(points, key=lambda found: (milliseconds(found), found.peak_allocated_bytes)):
        if not best or found.peak_allocated_bytes < best[-1].peak_allocated_bytes:
            best.append(found)
    return best


def milliseconds(found: Configuration) -> float:
    """Time of a thousand tokens over all GPUs; 0 where it is not known."""
    return 1e6 / found.time.tokens_per_second if found.time else 0.0


def name_of(found: Configuration) -> str:
    """A configuration in a few words."""
    config = found.config
    settings = "".join(f", {key}={value}" for key, value in found.settings.items() if key != "implementation")
    return (
        f"{found.optimizer} ({found.implementation}{settings}), {config.precision}, {config.batch_size} × "
        f"{config.grad_accum}, checkpointing {config.checkpointing}"
    )


def _trace(name: str, points: Sequence[Point], colour: str, *, size: int, joined: bool = False) -> Trace:
    return scatter(
        name=name,
        mode="lines+markers" if joined else "markers",
        x=[milliseconds(found) for found, _ in points],
        y=[gib(found.peak_allocated_bytes) for found, _ in points],
        customdata=[[found.peak_allocated_bytes, plain(name_of(found)), _wrapped(reason)] for found, reason in points],
        hovertemplate="<b>%{customdata[1]}</b><br>%{x:.1f} ms for 1000 tokens · %{y:.2f} GiB"
        "<br>%{customdata[2]}<extra></extra>",
        marker={"color": theme.variable(colour), "size": size, "line": {"width": 1, "color": theme.variable("card")}},
        line={"color": theme.variable(colour), "width": 2, "shape": "hv"},
    )


def _wrapped(sentence: str, *, width: int = 70) -> str:
    """A sentence in lines that a hover label can hold."""
    lines = [""]
    for word in plain(sentence).split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += f"{word} "
    return "<br>".join(line.strip() for line in lines)
