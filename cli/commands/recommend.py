"""`optplan recommend`: which configuration to run for a model and a GPU, and why every other choice lost."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optplan import options, output
from optplan.jobs import named
from optplan.search_options import SEARCHED_STEP, takes_search
from optplan.step_options import given, takes_step

if TYPE_CHECKING:
    from optplan.planner.search.records import SearchReport

_TARGETS = "python, hf-args, torchtitan, axolotl, llama-factory, deepspeed or accelerate"
_Explain = Annotated[
    bool, typer.Option("--explain", help="Account for every optimizer with its settings and number formats.")
]
_Export = Annotated[str | None, typer.Option(metavar="TARGET", help=f"Write the file that runs it: {_TARGETS}.")]
_Out = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Where --export writes.", show_default="stdout, instead of the answer"),
]


@takes_step(without=SEARCHED_STEP)
@takes_search()
def recommend(
    context: typer.Context,
    *,
    model: options.OptionalModel = None,
    job: options.FromFile = None,
    step: Any,
    search: Any,
    explain: _Explain = False,
    export: _Export = None,
    out: _Out = None,
    html: options.Html = None,
    md: options.Markdown = None,
    json: options.Json = False,
) -> None:
    """Recommend the configuration to run.

    Searches optimizers and their options, number formats, checkpointing, micro-batch and accumulation, fused loss,
    step in backward, GPUs and sharding; prints the one to run with its memory, time and evidence, the runner-up, the
    best trade-offs, and why each other optimizer lost. The exit status is 0 if something fits, 1 if nothing does, 2
    for bad input.
    """
    from optplan.planner.search.recommend import recommend as answer

    output.check_targets(html, md, out)
    _check_export(export, out, json=json)
    model, asked, notes = _question(job, model, step, search, given(context))
    asked, left_out = _limited(export, asked)
    report = answer(model, explain=explain, **asked)
    report.notes[:0] = [*notes, *left_out]
    if export is not None and report.recommendation is not None:
        _export(report, export, out, model=model)
    if json:
        output.print_json(report)
    elif export is None or out is not None or report.recommendation is None:
        from optplan.reports.terminal.recommend import render_recommend

        output.print_terminal(render_recommend, report)
    output.write_page(html, lambda: _page(report, model))
    output.write_page(md, lambda: _markdown(report))
    if report.recommendation is None:
        raise typer.Exit(1)


def _question(
    job: str | None, model: str | None, step: dict[str, Any], search: dict[str, Any], said: Collection[str]
) -> tuple[str, dict[str, Any], list[str]]:
    """The model and what is asked of the search, by a job file or by the command line alone, and notes on the file."""
    search = search | {"optimizer": search["optimizer"] or None, "options": search["options"] or None}
    if job is None:
        return named(model), step | search, []
    from optplan.planner.trainers.importing import read_job
    from optplan.planner.trainers.searching import question_of

    question = question_of(read_job(job), model=model, step=step, search=search, given=said)
    return question.model, question.asked, question.notes


def _check_export(target: str | None, out: str | None, *, json: bool) -> None:
    """Refuse before the search what could not be written after it."""
    from optplan.planner.errors import ConfigError
    from optplan.planner.trainers.export import check_export_target

    if target is None:
        if out is not None:
            raise ConfigError("--out is where --export writes: add --export TARGET")
        return
    check_export_target(target)
    if json and out is None:
        raise ConfigError("--json and --export both print to stdout: give --export a file with --out FILE")


def _limited(target: str | None, asked: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The search for a training program, and what it leaves out."""
    if target is None:
        return asked, []
    from optplan.planner.trainers.recommended import limited

    return limited(target, asked)


def _export(report: SearchReport, target: str, out: str | None, *, model: str) -> None:
    """The file; what must be done by hand and how to start it go to stderr."""
    from optplan.planner.trainers.export import write_export
    from optplan.planner.trainers.recommended import export_recommendation

    written = export_recommendation(report, target, model=model)
    if out is None:
        output.print_text(written.text)
    else:
        write_export(written, out)
    for sentence in (*written.by_hand, f"start it with: {written.command}"):
        print(f"optplan: {sentence}", file=sys.stderr)


def _page(report: SearchReport, model: str) -> str:
    from optplan.reports.html.recommendation_page import recommendation_page

    return recommendation_page(report, model=model)


def _markdown(report: SearchReport) -> str:
    from optplan.reports.markdown.recommend import recommend_markdown

    return recommend_markdown(report)
