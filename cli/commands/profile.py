"""`optplan profile`: a real training step on this machine, measured and held against the prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from optplan import options, output
from optplan.step_options import takes_step

if TYPE_CHECKING:
    from optplan.planner.measurement import Measurement


@takes_step(without=("memory", "engine", "gpus", "sharding", "alloc_conf"))
def profile(
    model: options.Model,
    step: Any,
    optimizer: Annotated[
        str, typer.Option("--optimizer", "-o", help="Optimizer: an id of `optplan optimizers`.")
    ] = "adamw",
    settings: options.Settings = None,
    steps: options.Steps = 8,
    device: Annotated[str, typer.Option(help="Where to run: cuda, cuda:1 ..., or cpu.")] = "cuda",
    out: Annotated[str | None, typer.Option(metavar="FILE", help="Save the record here, compressed.")] = None,
    json: options.Json = False,
) -> None:
    """Run a real training step on this machine and measure it.

    Trains a few steps of the model with random weights, records the third event by event, times the rest, and prints
    every figure beside what the rules predict. The exit status is 0 if the step ran, 1 if the memory did not suffice
    (the record says where), 2 for bad input.
    """
    from optplan.planner.record_files import check_target, save_record

    if out is not None:
        check_target(out)
    measuring = output.import_torch_part("optplan.profilers.live.command")
    with output.progress() as tell:
        record: Measurement = measuring.profile(
            model, optimizer=optimizer, options=settings, device=device, num_steps=steps, progress=tell, **step
        )
    # Shown first: what was measured is not lost if it cannot be saved.
    _show(record, json=json)
    if out is not None:
        save_record(record, out)
    if record.out_of_memory is not None:
        raise typer.Exit(1)


def _show(record: Measurement, *, json: bool) -> None:
    if json:
        output.print_json(record)
    else:
        from optplan.reports.terminal.measurement import render_measurement

        output.print_terminal(render_measurement, record)
