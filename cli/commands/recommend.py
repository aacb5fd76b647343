"""`optplan recommend`: which configuration to run for a model and a GPU, and why every other choice lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from optplan import options, output
from optplan.step_options import takes_step

if TYPE_CHECKING:
    from optplan.planner.search.records import SearchReport

_FREE = "searched"
_SEARCHED = (
    "precision", "batch_size", "grad_accum", "checkpointing", "fused_loss", "step_in_backward",
    "gpus", "nodes", "sharding",
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

    output.check_targets(html)
    report = search(
        model,
        optimizer=optimizer or None,
        options=settings,
        explain=explain,
        gpus=gpus,
        budget=budget,
        reserve=reserve,
        tokens_per_step=tokens_per_step,
        prefer=prefer,
        precision=precision,
        checkpointing=checkpointing,
        batch_size=batch_size,
        sharding=sharding,
        fused_loss=fused_loss,
        step_in_backward=step_in_backward,
        **step,
    )
    if json:
        output.print_json(report)
    else:
        from optplan.reports.terminal.recommend import render_recommend

        output.print_terminal(render_recommend, report)
    output.write_page(html, lambda: _page(report, model))
    if report.recommendation is None:
        raise typer.Exit(1)


def _page(report: SearchReport, model: str) -> str:
    from optplan.reports.html.recommendation_page import recommendation_page

    return recommendation_page(report, model=model)
