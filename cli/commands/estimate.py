"""`optplan estimate`: what a training step needs with each optimizer, and which one to take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from optplan import options, output
from optplan.jobs import asked
from optplan.step_options import given, takes_step

if TYPE_CHECKING:
    from optplan.planner.records import EstimateReport


@takes_step()
def estimate(
    context: typer.Context,
    *,
    model: options.OptionalModel = None,
    job: options.FromFile = None,
    step: Any,
    optimizer: options.Optimizers = None,
    settings: options.Settings = None,
    per_tensor: Annotated[bool, typer.Option("--per-tensor", help="List the state of every parameter.")] = False,
    html: options.Html = None,
    md: options.Markdown = None,
    json: options.Json = False,
) -> None:
    """Estimate a training step's memory by optimizer.

    Prints whether it fits, what to run and why, and for each optimizer its state, its peak and what is left of the GPU.
    The exit status is 0 if something fits, 1 if nothing does, 2 for bad input.
    """
    output.check_targets(html, md)
    read = asked(job, model=model, optimizers=optimizer, settings=settings, step=step, given=given(context))
    report = _report(read.model, optimizer=read.optimizers, options=read.settings, per_tensor=per_tensor, **read.step)
    report.notes[:0] = read.notes
    if json:
        output.print_json(report)
    else:
        from optplan.reports.terminal.estimate import render_estimate

        output.print_terminal(render_estimate, report)
    output.write_page(html, lambda: _page(report, read.model))
    output.write_page(md, lambda: _markdown(report))
    if report.estimates and all(row.fits is False for row in report.estimates):
        raise typer.Exit(1)


def _page(report: EstimateReport, model: str) -> str:
    from optplan.planner.estimate_details import details_of
    from optplan.reports.html.estimate_page import estimate_page

    return estimate_page(report, details_of(report, model=model))


def _markdown(report: EstimateReport) -> str:
    from optplan.reports.markdown.estimate import estimate_markdown

    return estimate_markdown(report)


def _report(model: str, **request: Any) -> EstimateReport:
    """The report by the engine asked for."""
    if request["engine"] != "trace":
        from optplan.planner.estimate import estimate as estimate_report

        return estimate_report(model, **request)
    estimation = output.import_torch_part("optplan.profilers.estimation")
    with output.progress() as tell:
        report: EstimateReport = estimation.traced_estimate(model, progress=tell, **request)
    return report
