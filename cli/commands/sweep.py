"""`optplan sweep`: estimates for every combination of models, GPUs, optimizers and sizes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optplan import options, output
from optplan.step_options import takes_step

if TYPE_CHECKING:
    from optplan.planner.sweep_records import SweepReport


def _listed(*names: str, help: str, metavar: str = "A,B", show_default: bool | str = True) -> Any:
    return typer.Option(*names, metavar=metavar, help=help, show_default=show_default)


_AXES = ("precision", "batch_size", "seq_len", "checkpointing", "gpu", "memory", "gpus", "nodes", "sharding", "engine")


@takes_step(without=_AXES)
def sweep(
    step: Any,
    models: Annotated[str, _listed("--models", "-m", help="Models: ids of `optplan models`, or config.json files.")],
    gpus: Annotated[str | None, _listed("--gpus", "-g", help="GPUs: ids of `optplan gpus`.")] = None,
    optimizers: Annotated[
        str | None, _listed("--optimizers", "-o", help="Optimizers: ids of `optplan optimizers`.", show_default="all")
    ] = None,
    settings: options.Settings = None,
    precisions: Annotated[str, _listed("--precisions", help="Precisions, as in optplan estimate.")] = "bf16",
    seq_lens: Annotated[
        str | None,
        _listed("--seq-lens", "-s", metavar="N,N", help="Tokens in a sequence.", show_default="2048 or the maximum"),
    ] = None,
    batch_sizes: Annotated[
        str, _listed("--batch-sizes", "-b", metavar="N,N", help="Sequences in one micro-batch.")
    ] = "1",
    checkpointing: Annotated[str, _listed("--checkpointing", help="Activation checkpointing.")] = "none",
    budget: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Bytes that torch may allocate, such as 38GiB: a GPU's memory, if less."),
    ] = None,
    ci: Annotated[bool, typer.Option("--ci", help="Print a line for each combination that does not fit.")] = False,
    csv: Annotated[str | None, typer.Option(metavar="FILE", help="Write every row here as CSV; - is stdout.")] = None,
    json: options.Json = False,
) -> None:
    """Estimate every combination of the values listed.

    Values are separated by commas. The exit status is 0 if a combination fits, 1 if none does, 2 for bad input; with
    --ci, 1 as soon as one combination does not fit, cannot run or is not predicted.
    """
    from optplan.planner.errors import ConfigError
    from optplan.planner.sweep import sweep as sweep_report

    if json and csv == "-":
        raise ConfigError("--json and --csv - both print to stdout: give --csv a file")
    with output.progress() as tell:
        report = sweep_report(
            _names("models", models),
            gpus=_names("gpus", gpus) if gpus is not None else (),
            optimizers=_names("optimizers", optimizers) if optimizers is not None else None,
            options=settings,
            precisions=_names("precisions", precisions),
            seq_lens=_numbers("seq-lens", seq_lens) if seq_lens is not None else None,
            batch_sizes=_numbers("batch-sizes", batch_sizes),
            checkpointings=_names("checkpointing", checkpointing),
            budget=budget,
            progress=tell,
            **step,
        )
    _deliver(report, csv=csv, json=json, ci=ci)
    if ci and report.violations:
        raise typer.Exit(1)
    if not ci and all(row.fits is False or row.reason is not None for row in report.rows):
        raise typer.Exit(1)


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


def _names(option: str, text: str) -> list[str]:
    return _split(option, text, lambda name: name)


def _numbers(option: str, text: str) -> list[int]:
    # Any other text goes on as it is, for the planner to refuse with the range allowed.
    return _split(option, text, lambda part: int(part) if part.isascii() and part.isdigit() else part)


def _split(option: str, text: str, read: Callable[[str], Any]) -> list[Any]:
    """The values between the commas.

    Raises:
        ConfigError: There is none, or an empty one.
    """
    from optplan.planner.errors import ConfigError, shorten

    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ConfigError(f"--{option} takes values separated by commas, got {shorten(text)}")
    return [read(part) for part in parts]
