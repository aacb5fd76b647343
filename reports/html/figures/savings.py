"""What each optimizer saves against AdamW in state, and how much of it is still there at the peak."""

from __future__ import annotations

from collections.abc import Sequence

from optplan.planner.records import Estimate
from optplan.reports.html import theme
from optplan.reports.html.figures.plot import Figure, Trace, bars
from optplan.reports.html.text import gib, plain


def savings(rows: Sequence[Estimate]) -> Figure:
    """Two bars an optimizer: saved in state, and saved at the peak of the step."""
    known = [row for row in rows if row.saving_against_adamw is not None]
    known.sort(key=lambda row: row.saving_against_adamw.state_bytes if row.saving_against_adamw else 0)
    names = [plain(row.optimizer) for row in known]
    states = [row.saving_against_adamw.state_bytes if row.saving_against_adamw else 0 for row in known]
    peaks = [row.saving_against_adamw.peak_bytes if row.saving_against_adamw else None for row in known]
    return Figure(
        data=[
            _bar("saved at the peak", names, peaks, "accent"),
            _bar("saved in state", names, states, "optimizer_state"),
        ],
        layout=theme.layout(
            height=64 + 30 * len(known),
            barmode="group",
            bargap=0.3,
            bargroupgap=0.08,
            showlegend=True,
            margin={"l": 8, "r": 24, "t": 12, "b": 8},
            xaxis=theme.axis(title=theme.titled("GiB less than AdamW"), zerolinewidth=2),
            yaxis=theme.axis(tickfont={"color": theme.variable("ink"), "size": 12}),
        ),
    )  # fmt: skip


def _bar(name: str, names: Sequence[str], sizes: Sequence[int | None], colour: str) -> Trace:
    return bars(
        orientation="h",
        name=name,
        x=[None if size is None else gib(size) for size in sizes],
        y=list(names),
        customdata=list(sizes),
        hovertemplate="<b>%{y}</b><br>%{fullData.name}: %{customdata:,} bytes · %{x:.2f} GiB<extra></extra>",
        marker={"color": theme.variable(colour)},
    )
