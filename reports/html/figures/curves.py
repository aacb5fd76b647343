"""Loss over training, optimizers over each other."""

from __future__ import annotations

from collections.abc import Sequence

from optplan.reports.html import theme
from optplan.reports.html.figures.plot import Figure, scatter
from optplan.reports.html.text import plain
from optplan.reports.html.training_runs import Curve


def loss_curves(curves: Sequence[Curve], *, title: str) -> Figure:
    """One line an optimizer: the mean over its seeds."""
    return Figure(
        data=[
            scatter(
                name=plain(curve.optimizer),
                x=curve.steps,
                y=curve.losses,
                mode="lines",
                line={"color": theme.series(index), "width": 2, "dash": theme.DASHES[index // len(theme.SERIES) % 4]},
                hovertemplate="<b>%{fullData.name}</b><br>step %{x:,}: %{y:.4f}<extra></extra>",
            )
            for index, curve in enumerate(curves)
        ],
        layout=theme.layout(
            height=460,
            showlegend=True,
            hovermode="closest",
            margin={"l": 8, "r": 16, "t": 8, "b": 8},
            xaxis=theme.axis(title=theme.titled("steps")),
            yaxis=theme.axis(title=theme.titled(title)),
        ),
    )  # fmt: skip
