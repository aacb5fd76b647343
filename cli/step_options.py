"""Options given to a command in one piece, above all those that say how a training step is run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, get_type_hints

import typer

from optplan import options

STEP = "step"
"""Name of the parameter by which a command takes all of them."""

_OPTIONS: dict[str, tuple[Any, Any]] = {
    "gpu": (options.GpuName, None),
    "memory": (options.Memory, None),
    "precision": (options.Precision, "bf16"),
    "state_dtype": (options.StateDtype, None),
    "batch_size": (options.BatchSize, 1),
    "seq_len": (options.SeqLen, None),
    "grad_accum": (options.GradAccum, 1),
    "checkpointing": (options.Checkpointing, "none"),
    "attention": (options.Attention, None),
    "fused_loss": (options.FusedLoss, "none"),
    "step_in_backward": (options.StepInBackward, False),
    "clip_grad_norm": (options.ClipGradNorm, None),
    "keep_grads": (options.KeepGrads, False),
    "padding_mask": (options.PaddingMask, False),
    "empty_cache": (options.EmptyCache, False),
    "gpus": (options.Gpus, 1),
    "nodes": (options.Nodes, None),
    "sharding": (options.Sharding, "none"),
    "tensor_parallel": (options.TensorParallel, 1),
    "sequence_parallel": (options.SequenceParallel, False),
    "pipeline_parallel": (options.PipelineParallel, 1),
    "pipeline_schedule": (options.PipelineSchedule, "1f1b"),
    "alloc_conf": (options.AllocConf, None),
    "engine": (options.Engine, "rules"),
}
"""Name to type and default, in the order of the help."""


def takes_step(*, without: tuple[str, ...] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of a step in the place of its parameter `step`, which receives them as a dictionary.

    Args:
        without: Options that the command does not have.
    """
    return takes_group(STEP, {name: option for name, option in _OPTIONS.items() if name not in without})


def takes_group(group: str, chosen: dict[str, tuple[Any, Any]]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command options in the place of one of its parameters, which receives them as a dictionary.

    Args:
        group: The parameter.
        chosen: The options' types and defaults by name, in the order of the help.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**arguments: Any) -> None:
            values = {name: arguments.pop(name) for name in chosen}
            command(**arguments, **{group: values})

        parameters = _expanded(command, group, chosen)
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": None}
        # What wraps keeps of the original's annotations would come before these.
        del run.__wrapped__
        return run

    return decorate


def given(context: typer.Context) -> set[str]:
    """Names of the options that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _expanded(command: Callable[..., None], group: str, chosen: dict[str, tuple[Any, Any]]) -> list[inspect.Parameter]:
    """The command's parameters with those of a group where its parameter stands."""
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name == group:
            parameters += [_parameter(key, annotation, default) for key, (annotation, default) in chosen.items()]
        else:
            parameters.append(_parameter(name, hints[name], parameter.default))
    return parameters


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
