"""The Typer application: one command per file of `optplan.commands`."""

from __future__ import annotations

from typing import Annotated

import typer

from optplan import __version__
from optplan.commands.compare import compare
from optplan.commands.estimate import estimate
from optplan.commands.explain import explain
from optplan.commands.gpus import gpus
from optplan.commands.models import models
from optplan.commands.optimizers import optimizers
from optplan.commands.profile import profile
from optplan.commands.published import published
from optplan.commands.recommend import recommend
from optplan.commands.replay import replay
from optplan.commands.report import report
from optplan.commands.show import show
from optplan.commands.sweep import sweep
from optplan.commands.timeline import timeline
from optplan.commands.validate import validate

app = typer.Typer(
    name="optplan",
    help="How much GPU memory a training step takes with each optimizer, and which configuration fits best.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    estimate,
    recommend,
    sweep,
    explain,
    timeline,
    profile,
    validate,
    compare,
    show,
    report,
    models,
    gpus,
    optimizers,
    published,
    replay,
):
    app.command()(command)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"optplan {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """How much GPU memory a training step takes with each optimizer, and which configuration fits best."""
    del version
