"""The axes of `optplan sweep`: lists of values with commas between them, given to it in one piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from optplan.step_options import takes_group

AXES = "axes"
"""Name of the parameter by which a command takes all of them."""

STEP_AXES = (
    "precision", "batch_size", "seq_len", "checkpointing", "gpu", "memory", "gpus", "nodes", "sharding", "engine",
)  # fmt: skip
"""Options of a step that are axes here, or that a sweep does not have."""


def _listed(*names: str, help: str, metavar: str = "A,B", show_default: bool | str = False) -> Any:
    return Annotated[str | None, typer.Option(*names, metavar=metavar, help=help, show_default=show_default)]


_OPTIONS: dict[str, tuple[Any, Any]] = {
    "models": _listed(
        "--models", "-m", help="Models: ids of `optplan models`, or config.json files. Needed unless --from names one."
    ),
    "gpus": _listed("--gpus", "-g", help="GPUs: ids of `optplan gpus`."),
    "gpus_per_run": _listed(
        "--gpus-per-run", metavar="N,N", help="Numbers of GPUs that work together.", show_default="1"
    ),
    "sharding": _listed(
        "--sharding", help="How several GPUs divide the work, as in optplan estimate.", show_default="none"
    ),
    "optimizers": _listed(
        "--optimizers", "-o", help="Optimizers: ids of `optplan optimizers`.", show_default="all"
    ),
    "precisions": _listed("--precisions", help="Precisions, as in optplan estimate.", show_default="bf16"),
    "seq_lens": _listed(
        "--seq-lens", "-s", metavar="N,N", help="Tokens in a sequence.", show_default="2048 or the maximum"
    ),
    "batch_sizes": _listed(
        "--batch-sizes", "-b", metavar="N,N", help="Sequences in one micro-batch.", show_default="1"
    ),
    "checkpointing": _listed("--checkpointing", help="Activation checkpointing.", show_default="none"),
}  # fmt: skip
_NUMBERS = ("gpus_per_run", "seq_lens", "batch_sizes")


def takes_axes() -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the axes in the place of its parameter `axes`, as a dictionary of texts."""
    return takes_group(AXES, {name: (annotation, None) for name, annotation in _OPTIONS.items()})


def split_axes(axes: dict[str, str | None]) -> dict[str, list[Any]]:
    """The values of the axes that were given.

    Raises:
        ConfigError: An axis has no value, or an empty one.
    """
    return {name: _split(name, text) for name, text in axes.items() if text is not None}


def _split(name: str, text: str) -> list[Any]:
    from optplan.planner.errors import ConfigError, shorten

    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ConfigError(f"--{name.replace('_', '-')} takes values separated by commas, got {shorten(text)}")
    return [_integer(part) for part in parts] if name in _NUMBERS else parts


def _integer(part: str) -> Any:
    # Any other text goes on as it is, for the planner to refuse with the range allowed.
    return int(part) if part.isascii() and part.isdigit() else part
