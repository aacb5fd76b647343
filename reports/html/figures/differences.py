"""Numbers of several records beside each other: bars by phase or by category."""

from __future__ import annotations

from collections.abc import Sequence

from optplan.planner.measured.comparison import ComparedRow, Comparison
from optplan.reports.html import theme
from optplan.reports.html.figures.plot import Figure, bars
from optplan.reports.html.text import gib, plain
from optplan.reports.labels import ROW_NAMES


def compared_bars(record: Comparison, rows: Sequence[ComparedRow]) -> Figure:
    """One group a row, one bar a record; rows count bytes."""
    names = [plain(ROW_NAMES.get(row.name, row.name)) for row in rows]
    return Figure(
        data=[
            bars(
                name=plain(side.label),
                x=names,
                y=[None if row.values[index] is None else gib(row.values[index] or 0) for row in rows],
                customdata=[[row.values[index], _difference(row, index)] for row in rows],
                marker={"color": theme.series(index)},
                hovertemplate="<b>%{x}</b> · %{fullData.name}<br>%{customdata[0]:,} bytes · %{y:.3f} GiB"
                "<br>%{customdata[1]}<extra></extra>",
            )
            for index, side in enumerate(record.sides)
        ],
        layout=theme.layout(
            height=380,
            barmode="group",
            bargap=0.3,
            bargroupgap=0.06,
            showlegend=True,
            margin={"l": 8, "r": 16, "t": 16, "b": 8},
            xaxis=theme.axis(showgrid=False, tickfont={"color": theme.variable("ink"), "size": 12}),
            yaxis=theme.axis(title=theme.titled("GiB"), rangemode="tozero"),
        ),
    )  # fmt: skip


def _difference(row: ComparedRow, side: int) -> str:
    difference = row.differences[side]
    if difference is None:
        return "nothing to compare with"
    return f"{int(difference):+,} bytes from the reference" if difference else "equal to the reference"
