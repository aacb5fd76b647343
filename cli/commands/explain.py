"""`optplan explain`: one configuration part by part, each number with its formula and its source."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from optplan import options, output
from optplan.step_options import takes_step


@takes_step(without=("engine",))
def explain(
    model: options.Model,
    step: Any,
    optimizer: Annotated[
        str, typer.Option("--optimizer", "-o", help="Optimizer: an id of `optplan optimizers`.")
    ] = "adamw",
    settings: options.Settings = None,
    json: options.Json = False,
) -> None:
    """Take one estimate apart.

    Prints every part of it, each number with its formula filled in and its source.
    """
    from optplan.planner.explain import explain as explain_estimate

    record = explain_estimate(model, optimizer=optimizer, options=settings, **step)
    if json:
        output.print_json(record)
    else:
        from optplan.reports.terminal.explain import render_explanation

        output.print_terminal(render_explanation, record)
