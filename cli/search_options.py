"""The options that say what `optplan recommend` searches, given to it in one piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from optplan import options
from optplan.step_options import takes_group

SEARCH = "search"
"""Name of the parameter by which a command takes all of them."""

SEARCHED_STEP = (
    "precision", "batch_size", "grad_accum", "checkpointing", "fused_loss", "step_in_backward",
    "gpus", "nodes", "sharding", "tensor_parallel", "sequence_parallel", "pipeline_parallel", "pipeline_schedule",
    "engine",
)  # fmt: skip
"""Options of a step that the search answers, or does not have."""

_FREE = "searched"
_GPUS = Annotated[str, typer.Option("--gpus", metavar="N|A..B", help="Number of GPUs, or a range of it.")]
_BUDGET = Annotated[
    str | None, typer.Option("--budget", metavar="SIZE", help="Take no more than this of each GPU, such as 38GiB.")
]
_RESERVE = Annotated[
    str | None, typer.Option("--reserve", metavar="SIZE", help="Leave this much of each GPU alone, such as 2GiB.")
]
_PREFER = Annotated[str, typer.Option(help="What to pick by: quality, speed or memory.")]
_PRECISION = Annotated[str | None, typer.Option(help="Fix the number formats.", show_default=_FREE)]
_CHECKPOINTING = Annotated[str | None, typer.Option(help="Fix the checkpointing.", show_default=_FREE)]
_SHARDING = Annotated[str | None, typer.Option(help="Fix the sharding of several GPUs.", show_default=_FREE)]
_FUSED_LOSS = Annotated[str | None, typer.Option(help="Fix the loss: none, liger or chunked.", show_default=_FREE)]
_STEP_IN_BACKWARD = Annotated[
    bool | None,
    typer.Option("--step-in-backward/--no-step-in-backward", help="Require or exclude it.", show_default=_FREE),
]

_OPTIONS: dict[str, tuple[Any, Any]] = {
    "gpus": (_GPUS, "1"),
    "budget": (_BUDGET, None),
    "reserve": (_RESERVE, None),
    "tokens_per_step": (options.TokensPerStep, None),
    "prefer": (_PREFER, "quality"),
    "optimizer": (options.Optimizers, None),
    "options": (options.Settings, None),
    "precision": (_PRECISION, None),
    "checkpointing": (_CHECKPOINTING, None),
    "batch_size": (options.FixedBatchSize, None),
    "sharding": (_SHARDING, None),
    "fused_loss": (_FUSED_LOSS, None),
    "step_in_backward": (_STEP_IN_BACKWARD, None),
}
"""Name to type and default, in the order of the help; the names are those of the planner's search."""


def takes_search() -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of a search in the place of its parameter `search`, as a dictionary."""
    return takes_group(SEARCH, _OPTIONS)
