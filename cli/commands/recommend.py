"""`optplan recommend`: which configuration to run for a model and a GPU, and why every other choice lost."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optplan import options, output
from optplan.step_options import takes_step

if TYPE_CHECKING:
    from optplan.planner.search.records import SearchReport

_FREE = "searched"
_SEARCHED = (
    "precision", "batch_size", "grad_accum", "checkpointing", "fused_loss", "step_in_backward",
    "gpus", "nodes", "sharding", "tensor_parallel", "sequence_parallel", "pipeline_parallel", "pipeline_schedule",
)  # fmt: skip


@takes_step(without=(*_SEARCHED, "engine"))
def recommend(
    model: options.Model,
    step: Any,
    gpus: Annotated[str, typer.Option("--gpus", metavar="N|A..B", help="Number of GPUs, or a range of it.")] = "1",
    budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Take no more than this of each GPU, such as 38GiB.")
    ] = None,
    reserve: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Leave this much of each GPU alone, such as 2GiB.")
    ] = None,
    tokens_per_step: options.TokensPerStep = None,
    prefer: Annotated[str, typer.Option(help="What to pick by: quality, speed or memory.")] = "quality",
    optimizer: options.Optimizers = None,
    settings: options.Settings = None,
    precision: Annotated[str | None, typer.Option(help="Fix the number formats.", show_default=_FREE)] = None,
    checkpointing: Annotated[str | None, typer.Option(help="Fix the checkpointing.", show_default=_FREE)] = None,
    batch_size: options.FixedBatchSize = None,
    sharding: Annotated[str | None, typer.Option(help="Fix the sharding of several GPUs.", show_default=_FREE)] = None,
    fused_loss: Annotated[str | None, typer.Option(help="Fix the loss: none or liger.", show_default=_FREE)] = None,
    step_in_backward: Annotated[
        bool | None,
        typer.Option("--step-in-backward/--no-step-in-backward", help="Require or exclude it.", show_default=_FREE),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Account for every optimizer with its settings and number formats.")
    ] = False,
    export: Annotated[
        str | None,
        typer.Option(
            metavar="TARGET",
            help="Write the file that runs it: python, hf-args, torchtitan, axolotl, llama-factory, deepspeed or "
            "accelerate.",
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Where --export writes.", show_default="stdout, instead of the answer"),
    ] = None,
    html: options.Html = None,
    json: options.Json = False,
) -> None:
    """Recommend the configuration to run.

    Searches optimizers and their options, number formats, checkpointing, micro-batch and accumulation, fused loss,
    step in backward, GPUs and sharding; prints the one to run with its memory, time and evidence, the runner-up, the
    best trade-offs, and why each other optimizer lost. The exit status is 0 if something fits, 1 if nothing does, 2
    for bad input.
    """
    from optplan.planner.search.recommend import recommend as search

    output.check_targets(html, out)
    _check_export(export, out, json=json)
    asked: dict[str, Any] = {
        "optimizer": optimizer or None,
        "options": settings or None,
        "precision": precision,
        "checkpointing": checkpointing,
        "batch_size": batch_size,
        "sharding": sharding,
        "fused_loss": fused_loss,
        "step_in_backward": step_in_backward,
    }
    asked, notes = _limited(export, asked)
    report = search(
        model,
        explain=explain,
        gpus=gpus,
        budget=budget,
        reserve=reserve,
        tokens_per_step=tokens_per_step,
        prefer=prefer,
        **asked,
        **step,
    )
    report.notes[:0] = notes
    if export is not None and report.recommendation is not None:
        _export(report, export, out, model=model)
    if json:
        output.print_json(report)
    elif export is None or out is not None or report.recommendation is None:
        from optplan.reports.terminal.recommend import render_recommend

        output.print_terminal(render_recommend, report)
    output.write_page(html, lambda: _page(report, model))
    if report.recommendation is None:
        raise typer.Exit(1)


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
