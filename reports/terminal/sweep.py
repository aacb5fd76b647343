"""`optplan sweep` for the terminal: one line a combination."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from optplan.planner.errors import printable
from optplan.planner.sweep_records import SweepReport, SweepRow
from optplan.planner.units import GIB
from optplan.reports.terminal.console import glyphs_of

_CONSTANT_AXES = ("model", "gpu", "gpus", "sharding", "precision", "seq_len", "batch_size", "checkpointing")
_USUAL = {"gpus": 1, "sharding": "none"}


def render_sweep(report: SweepReport, console: Console) -> None:
    """Print the rows; what is the same in all of them is said once, above."""
    varying = [name for name in _CONSTANT_AXES if len(report.axes[name]) > 1]
    same = [f"{name.replace('_', ' ')} {_first(report, name)}" for name in _CONSTANT_AXES if _is_said(report, name)]
    console.print(", ".join(same), style="dim")
    table = Table(box=glyphs_of(console).box, pad_edge=False)
    for name in varying:
        table.add_column(name.replace("_", " ").capitalize(), no_wrap=name in ("gpus", "seq_len", "batch_size"))
    table.add_column("Optimizer")
    for title in ("State GiB", "Peak GiB", "Free GiB", "Step s"):
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
    for note in report.notes:
        console.print(f"{glyphs_of(console).bullet} {printable(note)}", style="dim")


def _is_said(report: SweepReport, name: str) -> bool:
    """Whether the same in all rows, and not what is understood anyway."""
    return len(report.axes[name]) == 1 and _first(report, name) != _USUAL.get(name)


def _first(report: SweepReport, name: str) -> object:
    return getattr(report.rows[0], name)


def _figures(row: SweepRow) -> list[str]:
    seconds = "-" if row.step_seconds is None else f"{row.step_seconds:.3g}"
    return [_gib(row.optimizer_state_bytes), _gib(row.peak_allocated_bytes), _gib(row.headroom_bytes), seconds]


def _gib(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / GIB:.2f}"


def _verdict(row: SweepRow) -> str:
    if row.reason is not None:
        return f"cannot run: {row.reason}"
    return {True: "yes", False: "no", None: "not predicted"}[row.fits]
