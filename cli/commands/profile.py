"""`optplan profile`: a real training step on this machine, measured and held against the prediction."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optplan import options, output
from optplan.step_options import takes_step

if TYPE_CHECKING:
    from optplan.planner.measured.measurement import Measurement


@takes_step(
    without=(
        "memory",
        "engine",
        "gpus",
        "nodes",
        "tensor_parallel",
        "sequence_parallel",
        "pipeline_parallel",
        "pipeline_schedule",
        "alloc_conf",
    )
)
def profile(
    step: Any,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="NAME", help="Model: an id of `optplan models`, or a config.json."),
    ] = None,
    optimizer: Annotated[
        str, typer.Option("--optimizer", "-o", help="Optimizer: an id of `optplan optimizers`.")
    ] = "adamw",
    settings: options.Settings = None,
    script: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Instead of building a model: run this training script and follow it."),
    ] = None,
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="-- ARGS", help="The script's own arguments.")
    ] = None,
    steps: options.Steps = 8,
    device: Annotated[str, typer.Option(help="Where to run: cuda, cuda:1 ..., or cpu.")] = "cuda",
    out: Annotated[str | None, typer.Option(metavar="FILE", help="Save the record here, compressed.")] = None,
    html: options.Html = None,
    md: options.Markdown = None,
    json: options.Json = False,
) -> None:
    """Run a real training step on this machine and measure it.

    Trains a few steps of the model with random weights, records the third event by event, times the rest, and prints
    every figure beside what the rules predict. With --script, a training script of your own is run instead and the
    first optimizer that it steps is followed; --model then only names its model. Started by torchrun with --sharding,
    every process measures its part of one step and the first has the record. The exit status is 0 if the step ran,
    1 if the memory did not suffice (the record says where), 2 for bad input.
    """
    from optplan.planner.measured.record_files import save_record

    if os.environ.get("RANK", "0") == "0":  # of several processes the first alone writes
        output.check_targets(out, html, md)
    # The command line switches it off for its own short life; a training loop needs it.
    gc.enable()
    if script is not None:
        scripts = output.import_torch_part("optplan.profilers.live.script")
        record: Measurement = scripts.profile_script(
            script, arguments or [], num_steps=steps, name=model, gpu=step["gpu"]
        )
    else:
        measured = _measure(
            model, arguments, optimizer=optimizer, options=settings, device=device, num_steps=steps, **step
        )
        if measured is None:
            return  # one of several processes, of which the first has the record
        record = measured
    # Shown first: what was measured is not lost if it cannot be saved.
    _show(record, json=json)
    if out is not None:
        save_record(record, out)
    output.write_page(html, lambda: _page(record))
    output.write_page(md, lambda: _markdown(record))
    if record.out_of_memory is not None:
        raise typer.Exit(1)
    if any(note.startswith("interrupted") for note in record.notes):
        raise KeyboardInterrupt


def _measure(model: str | None, arguments: list[str] | None, **request: Any) -> Measurement | None:
    """A catalogue model's step; None in all but the first of several processes that take it together."""
    from optplan.planner.errors import ConfigError, shorten

    if arguments:
        raise ConfigError(f"arguments belong to a script: give --script FILE, or leave {shorten(arguments[0])} out")
    if model is None:
        raise ConfigError("nothing to profile: give --model NAME, or a training script with --script FILE")
    measuring = output.import_torch_part("optplan.profilers.live.command")
    with output.progress() as tell:
        try:
            record: Measurement | None = measuring.profile(model, progress=tell, **request)
        except measuring.OtherRankError:
            raise typer.Exit(1) from None
    return record


def _show(record: Measurement, *, json: bool) -> None:
    if json:
        output.print_json(record)
    else:
        from optplan.reports.terminal.measurement import render_measurement

        output.print_terminal(render_measurement, record)


def _page(record: Measurement) -> str:
    from optplan.reports.html.documents import record_page

    return record_page(record)


def _markdown(record: Measurement) -> str:
    from optplan.reports.markdown.documents import record_markdown

    return record_markdown(record)
