"""The optimizer's state by module: the area of each tile is its bytes."""

from __future__ import annotations

from collections.abc import Sequence

from optplan.planner.estimate_details import StateRow
from optplan.reports.html import theme
from optplan.reports.html.figures.plot import Figure, treemap
from optplan.reports.html.text import plain

_ROOT = "state"
_SEPARATOR = "\x1f"


def state_treemap(rows: Sequence[StateRow]) -> Figure:
    """State tensors below the modules that their parameters belong to; layers that are alike are one tile."""
    totals = _totals(rows)
    ids = list(totals)
    leaves = set(ids) - {id_.rpartition(_SEPARATOR)[0] for id_ in ids}
    return Figure(
        data=[
            treemap(
                ids=[plain_id(id_) for id_ in ids],
                labels=[plain(id_.rpartition(_SEPARATOR)[2]) for id_ in ids],
                parents=[plain_id(id_.rpartition(_SEPARATOR)[0]) for id_ in ids],
                values=[totals[id_] for id_ in ids],
                branchvalues="total",
                sort=True,
                tiling={"pad": 2},
                marker={
                    "colors": [theme.series(_kind(id_, rows)) if id_ in leaves else theme.variable("sunken")
                               for id_ in ids],
                    "line": {"width": 1, "color": theme.variable("card")},
                    "pad": {"t": 22, "l": 4, "r": 4, "b": 4},
                },
                textfont={"size": 12},
                texttemplate="%{label}<br>%{percentRoot:.1%}",
                hovertemplate="<b>%{id}</b><br>%{value:,} bytes<br>%{percentRoot:.2%} of the state<extra></extra>",
                pathbar={"visible": False},
                root={"color": theme.variable("sunken")},
            )
        ],
        layout=theme.layout(height=460, margin={"l": 0, "r": 0, "t": 0, "b": 0}),
    )  # fmt: skip


def plain_id(id_: str) -> str:
    """A tile's path with dots, as text."""
    return plain(id_.replace(_SEPARATOR, "."))


def _totals(rows: Sequence[StateRow]) -> dict[str, int]:
    """Bytes of every tile, parents before their children."""
    totals: dict[str, int] = {}
    for row in rows:
        if row.device != "device":
            continue
        # A weight is called by its module; a module and its bias share a tile's frame.
        module = row.parameter.removesuffix(".weight").split(".") if row.parameter else ["kept once"]
        path = [_ROOT, *module, row.state]
        for length in range(1, len(path) + 1):
            id_ = _SEPARATOR.join(path[:length])
            totals[id_] = totals.get(id_, 0) + row.bytes
    return _without_only_children(totals)


def _without_only_children(totals: dict[str, int]) -> dict[str, int]:
    """The same with a module that holds nothing but one other joined to it: `model.layers.*` is one frame."""
    children: dict[str, list[str]] = {}
    for id_ in totals:
        children.setdefault(id_.rpartition(_SEPARATOR)[0], []).append(id_)
    for id_ in totals:
        only = children.get(id_, [])
        if id_ != _ROOT and len(only) == 1 and only[0] in children:
            joined = f"{id_}.{only[0].rpartition(_SEPARATOR)[2]}"
            return _without_only_children(
                {_moved(key, only[0], joined): size for key, size in totals.items() if key != id_}
            )
    return totals


def _moved(id_: str, old: str, new: str) -> str:
    return new + id_.removeprefix(old) if id_ == old or id_.startswith(old + _SEPARATOR) else id_


def _kind(id_: str, rows: Sequence[StateRow]) -> int:
    """Place of the leaf's state among the kinds of state; one kind has one colour."""
    return list(dict.fromkeys(row.state for row in rows)).index(id_.rpartition(_SEPARATOR)[2])
