"""`optplan sweep`: estimates for every combination of models, GPUs, optimizers and sizes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optplan import options, output
from optplan.jobs import named
from optplan.step_options import given, takes_step
from optplan.sweep_options import STEP_AXES, split_axes, takes_axes

if TYPE_CHECKING:
    from optplan.planner.sweep_records import SweepReport

_Budget = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Bytes that torch may allocate, such as 38GiB: a GPU's memory, if less."),
]
_Ci = Annotated[bool, typer.Option("--ci", help="Print a line for each combination that does not fit.")]
_Csv = Annotated[str | None, typer.Option(metavar="FILE", help="Write every row here as CSV; - is stdout.")]


@takes_step(without=STEP_AXES)
@takes_axes()
def sweep(
    context: typer.Context,
    *,
    axes: Any,
    job: options.FromFile = None,
    settings: options.Settings = None,
    step: Any,
    budget: _Budget = None,
    ci: _Ci = False,
    csv: _Csv = None,
    json: options.Json = False,
) -> None:
    """Estimate every combination of the values listed.

    Values are separated by commas. With --from FILE an axis that is left out has the job's value. The exit status is 0
    if a combination fits, 1 if none does, 2 for bad input; with --ci, 1 as soon as one combination does not fit, cannot
    run or is not predicted.
    """
    from optplan.planner.errors import ConfigError

    if json and csv == "-":
        raise ConfigError("--json and --csv - both print to stdout: give --csv a file")
    report = _report(job, split_axes(axes), settings, step, budget, said=given(context))
    _deliver(report, csv=csv, json=json, ci=ci)
    if ci and report.violations:
        raise typer.Exit(1)
    if not ci and all(row.fits is False or row.reason is not None for row in report.rows):
        raise typer.Exit(1)


def _report(
    job: str | None,
    axes: dict[str, Any],
    settings: list[str] | None,
    step: dict[str, Any],
    budget: str | None,
    *,
    said: set[str],
) -> SweepReport:
    """The grid of the command line, or the one around a job file."""
    from optplan.planner.sweep import sweep as sweep_report

    notes: list[str] = []
    if job is not None:
        from optplan.planner.trainers.importing import read_job
        from optplan.planner.trainers.sweeping import sweep_of

        read = sweep_of(read_job(job), axes=axes, settings=settings, step=step, given=said)
        axes, settings, step, notes = dict(read.axes), read.settings, read.step, read.notes
    models = axes.pop("models", None) or [named(None, option="--models")]
    names = {"sharding": "shardings", "checkpointing": "checkpointings"}
    lists = {names.get(name, name): values for name, values in axes.items()}
    with output.progress() as tell:
        report = sweep_report(models, options=settings, budget=budget, progress=tell, **lists, **step)
    report.notes[:0] = notes
    return report


def _deliver(report: SweepReport, *, csv: str | None, json: bool, ci: bool) -> None:
    """The file asked for and one form of the rows on stdout; with --ci the violations, elsewhere if stdout is taken."""
    if csv is not None:
        _write_csv(report, csv)
    if json:
        output.print_json(report)
    elif csv is None and not ci:
        from optplan.reports.terminal.sweep import render_sweep

        output.print_terminal(render_sweep, report)
    if ci:
        stream = sys.stderr if json or csv == "-" else sys.stdout
        for line in report.violations:
            print(line, file=stream)


def _write_csv(report: SweepReport, target: str) -> None:
    from optplan.planner.measured.record_files import write_atomically
    from optplan.reports.sweep_csv import sweep_csv

    text = sweep_csv(report)
    if target == "-":
        output.print_text(text)
    else:
        write_atomically(Path(target), text.encode())
