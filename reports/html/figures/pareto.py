"""Peak memory against the time of a step, the front marked: drawn where the record knows the times."""

from __future__ import annotations

from collections.abc import Sequence

from optplan.planner.records import Estimate, GpuRow
from optplan.reports.html import theme
from optplan.reports.html.figures.plot import Figure, Trace, scatter
from optplan.reports.html.text import gib, plain

_SIDES = ("top right", "bottom left", "bottom right", "top right")
"""Where the names of the front stand beside their points: neighbours go different ways."""


def step_seconds(row: Estimate) -> float | None:
    """The time of a whole step, None where the record has none."""
    return (row.step_seconds or {}).get("step")


def front(rows: Sequence[Estimate]) -> list[Estimate]:
    """The rows that no other beats in both peak and time, the fastest first."""
    timed = [row for row in rows if step_seconds(row) is not None and row.peak_allocated_bytes is not None]
    ordered = sorted(timed, key=lambda row: (step_seconds(row) or 0, row.peak_allocated_bytes or 0))
    best: list[Estimate] = []
    for row in ordered:
        if not best or (row.peak_allocated_bytes or 0) < (best[-1].peak_allocated_bytes or 0):
            best.append(row)
    return best


def why_not(row: Estimate, rows: Sequence[Estimate]) -> str:
    """Why a row is not on the front: what is at least as fast and as small; empty for one that is on it."""
    members = front(rows)
    if row in members:
        return ""
    beaten_by = [
        other.optimizer
        for other in members
        if (step_seconds(other) or 0) <= (step_seconds(row) or 0)
        and (other.peak_allocated_bytes or 0) <= (row.peak_allocated_bytes or 0)
    ]
    return f"{', '.join(beaten_by)}: no slower, with no more memory"


def pareto(rows: Sequence[Estimate], *, gpu: GpuRow) -> Figure:
    """One point an optimizer; the front is joined by a line."""
    timed = [row for row in rows if step_seconds(row) is not None and row.peak_allocated_bytes is not None]
    members = front(rows)
    losers = [row for row in timed if row not in members]
    return Figure(
        data=[
            _points("on the front", members, rows, "accent", mode="lines+markers+text"),
            _points("beaten", losers, rows, "muted", mode="markers"),
        ],
        layout=theme.layout(
            height=460,
            showlegend=True,
            margin={"l": 8, "r": 40, "t": 12, "b": 8},
            xaxis=theme.log_axis("milliseconds a step", [1000 * (step_seconds(row) or 0) for row in timed]),
            yaxis=theme.axis(title=theme.titled("GiB, peak allocated"), rangemode="tozero"),
            **theme.limit_line(gib(gpu.usable_bytes), "usable"),
        ),
    )  # fmt: skip


def _points(name: str, rows: Sequence[Estimate], all_rows: Sequence[Estimate], colour: str, *, mode: str) -> Trace:
    return scatter(
        name=name,
        mode=mode,
        x=[(step_seconds(row) or 0) * 1000 for row in rows],
        y=[gib(row.peak_allocated_bytes or 0) for row in rows],
        text=[plain(row.optimizer) for row in rows],
        textposition=[_SIDES[index % len(_SIDES)] for index in range(len(rows))],
        textfont={"size": 11, "color": theme.variable("muted")},
        customdata=[plain(why_not(row, all_rows)) for row in rows],
        hovertemplate="<b>%{text}</b><br>%{x:.1f} ms · %{y:.2f} GiB<br>%{customdata}<extra></extra>",
        marker={"color": theme.variable(colour), "size": 10},
        line={"color": theme.variable(colour), "width": 2, "shape": "hv"},
    )
