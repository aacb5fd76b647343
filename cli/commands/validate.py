"""`optplan validate`: many steps measured on this machine's GPU, and the accuracy of the estimates over all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from optplan import options, output
from optplan.planner.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from optplan.planner.measured.validation import ValidationReport


def validate(
    records: Annotated[
        str, typer.Option("--records", metavar="FOLDER", help="Where the records are kept; those there already count.")
    ],
    matrix: Annotated[str, typer.Option(help="Which steps: quick, full, families, public or sharded.")] = "quick",
    minutes: Annotated[float, typer.Option(help="Begin no step after so many minutes.")] = 30,
    steps: options.Steps = 8,
    device: Annotated[str, typer.Option(help="Where to run: cuda, cuda:1 ..., or cpu.")] = "cuda",
    check: Annotated[bool, typer.Option("--check", help="Measure nothing: judge the records that are there.")] = False,
    measure_only: Annotated[
        bool, typer.Option("--measure-only", help="Judge nothing: leave that to --check, later or elsewhere.")
    ] = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="Hold the records against the trace engine too; needs torch.")
    ] = False,
    keep_history: Annotated[
        bool, typer.Option("--keep-history", help="Keep each step event by event; larger records.")
    ] = False,
    gpus_in_parallel: Annotated[
        int, typer.Option("--gpus-in-parallel", help="Measure on so many GPUs at once, a step each.")
    ] = 1,
    html: options.Html = None,
    md: options.Markdown = None,
    json: options.Json = False,
) -> None:
    """Measure a matrix of steps and judge the estimates by them.

    Each step runs in a process of its own; a validation that was stopped goes on where it ended. Then every record is
    held against today's rules: state bytes, peak, reserved and device memory, and times, to which a step_times.jsonl
    beside the records adds those of further processes; with --trace also against the trace engine, which runs each
    model again without a GPU. The exit status is 0 if all state bytes are predicted exactly, 1 if not, 2 for bad input.
    """
    output.check_targets(html, md)
    if check and measure_only:
        raise ConfigError("--check and --measure-only exclude each other: nothing would be done")
    if trace and measure_only:
        raise ConfigError("--trace and --measure-only exclude each other: nothing would be judged")
    if not check:
        _measure(
            records,
            matrix,
            minutes=minutes,
            steps=steps,
            device=device,
            keep_history=keep_history,
            gpus_in_parallel=gpus_in_parallel,
        )
    if measure_only:
        return
    report = _judge(records, traces=trace)
    if json:
        output.print_json(report)
    else:
        from optplan.reports.terminal.validation import render_validation

        output.print_terminal(render_validation, report)
    output.write_page(html, lambda: _page(records))
    output.write_page(md, lambda: _markdown(report))
    if not report.is_exact:
        raise typer.Exit(1)


def _page(records: str) -> str:
    from optplan.planner.accuracy import accuracy_of
    from optplan.reports.html.accuracy_page import accuracy_page

    return accuracy_page(accuracy_of(_paths(records)))


def _markdown(report: ValidationReport) -> str:
    from optplan.reports.markdown.validation import validation_markdown

    return validation_markdown(report)


def _judge(records: str, *, traces: bool) -> ValidationReport:
    from functools import partial

    from optplan.planner.measured.validation import validate_records

    paths = _paths(records)
    if not traces:
        return validate_records(paths)
    tracing = output.import_torch_part("optplan.profilers.validation.record_tracing")
    with output.progress() as tell:
        return validate_records(paths, trace=partial(tracing.trace_records, tell=tell))


def _paths(records: str) -> list[Path]:
    """The records of the folder."""
    from pathlib import Path

    from optplan.planner.errors import shorten

    folder = Path(records)
    if not folder.is_dir():
        raise ConfigError(f"--records {shorten(records)} is no folder")
    paths = [path for path in folder.iterdir() if path.name.endswith((".json.gz", ".json"))]
    if not paths:
        raise ConfigError(f"--records {shorten(records)} holds no record")
    return paths


def _measure(records: str, matrix: str, *, minutes: float, device: str, **how: Any) -> None:
    from pathlib import Path

    validation = output.import_torch_part("optplan.profilers.validation.command")
    with output.progress() as tell:
        outcome = validation.run_matrix(
            matrix, Path(records), device=device, budget_seconds=minutes * 60, tell=tell, **how
        )
    for name, reason in outcome.items():
        typer.echo(f"{name}: {reason}", err=True)
