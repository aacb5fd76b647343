"""`optplan timeline`: memory over one step, the moment of its peak, and what would lower it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from optplan import options, output
from optplan.jobs import asked
from optplan.step_options import given, takes_step

if TYPE_CHECKING:
    from optplan.planner.timeline_report import TimelineReport


@takes_step()
def timeline(
    context: typer.Context,
    *,
    model: options.OptionalModel = None,
    job: options.FromFile = None,
    step: Any,
    optimizer: Annotated[
        str | None,
        typer.Option("--optimizer", "-o", help="Optimizer: an id of `optplan optimizers`.", show_default="adamw"),
    ] = None,
    settings: options.Settings = None,
    json: options.Json = False,
) -> None:
    """Follow a training step's memory allocation by allocation.

    Prints memory over a steady step as a chart, the moment of its peak, the largest tensors alive there by name, and
    which change of the step would lower it by how much. The exit status is 0 if the step fits, 1 if it does not, 2 for
    bad input.
    """
    chosen = [optimizer] if optimizer else None
    read = asked(job, model=model, optimizers=chosen, settings=settings, step=step, given=given(context))
    report = _report(read.model, (read.optimizers or ["adamw"])[0], read.settings, read.step)
    report.notes[:0] = read.notes
    if json:
        output.print_json(report)
    else:
        from optplan.reports.terminal.timeline import render_timeline

        output.print_terminal(render_timeline, report)
    if not report.fits:
        raise typer.Exit(1)


def _report(model: str, optimizer: str, settings: list[str] | None, step: dict[str, Any]) -> TimelineReport:
    """The report by the engine asked for."""
    if step["engine"] != "trace":
        from optplan.planner.step_timeline import timeline as rules_timeline

        return rules_timeline(model, optimizer=optimizer, options=settings, **step)
    estimation = output.import_torch_part("optplan.profilers.estimation")
    with output.progress() as tell:
        report: TimelineReport = estimation.traced_timeline(
            model, optimizer=optimizer, options=settings, progress=tell, **step
        )
    return report
