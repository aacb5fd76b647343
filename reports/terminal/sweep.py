"""`optplan sweep` for the terminal: one line a combination."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from optplan.planner.sweep_records import SweepReport, SweepRow
from optplan.planner.units import GIB
from optplan.reports.terminal.console import glyphs_of

_CONSTANT_AXES = ("model", "gpu", "precision", "seq_len", "batch_size", "checkpointing")


def render_sweep(report: SweepReport, console: Console) -> None:
    """Print the rows; what is the same in all of them is said once, above."""
    varying = [name for name in _CONSTANT_AXES if len(report.axes[name]) > 1]
    same = [f"{name.replace('_', ' ')} {_first(report, name)}" for name in _CONSTANT_AXES if name not in varying]
    console.print(", ".join(same), style="dim")
    table = Table(box=glyphs_of(console).box, pad_edge=False)
    for name in varying:
        table.add_column(name.replace("_", " ").capitalize(), no_wrap=name in ("seq_len", "batch_size"))
    table.add_column("Optimizer")
    for title in ("State GiB", "Peak GiB", "Free GiB"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("Fits")
    for row in report.rows:
        cells = [str(getattr(row, name)) for name in varying]
        style = None if row.fits else "dim"
        table.add_row(*cells, row.optimizer, *_figures(row), _verdict(row), style=style)
    console.print(table)
    num_fitting = sum(row.fits is True for row in report.rows)
    limit = (
        "" if report.budget_bytes is None else f" Within {report.budget_bytes / GIB:.2f} GiB where the GPU has more."
    )
    console.print(
        f"{num_fitting} of {len(report.rows)} fit.{limit} Bytes and the rest: --json or --csv FILE.", style="dim"
    )


def _first(report: SweepReport, name: str) -> object:
    return getattr(report.rows[0], name)


def _figures(row: SweepRow) -> list[str]:
    return [_gib(row.optimizer_state_bytes), _gib(row.peak_allocated_bytes), _gib(row.headroom_bytes)]


def _gib(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / GIB:.2f}"


def _verdict(row: SweepRow) -> str:
    if row.reason is not None:
        return f"cannot run: {row.reason}"
    return {True: "yes", False: "no", None: "not predicted"}[row.fits]
