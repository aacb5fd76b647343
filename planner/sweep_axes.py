"""The axes of a sweep: their values checked before anything is computed, and the request at one point of the grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from optplan.planner.errors import ConfigError, unknown
from optplan.planner.gpus import Gpu, custom_gpu, load_gpu
from optplan.planner.request import LIMITS, StepRequest, check_request
from optplan.planner.sharding.registry import SHARDINGS
from optplan.planner.units import parse_size

MAX_ROWS = 20_000
"""Combinations of one sweep: at a few milliseconds to a second each, more is a job for several processes."""

AXES = ("model", "gpu", "layout", "precision", "seq_len", "batch_size", "checkpointing", "optimizer")
"""The order of the rows, first axis slowest."""


def request_at(point: dict[str, Any], step: dict[str, Any]) -> StepRequest:
    """The request of one combination.

    Raises:
        ConfigError: The combination cannot run.
    """
    gpu: Gpu = point["gpu"]
    target: dict[str, Any] = {"memory": gpu.total_bytes} if gpu.is_budget else {"gpu": gpu.id}
    sizes = {name: point[name] for name in ("precision", "seq_len", "batch_size", "checkpointing")}
    sizes["gpus"], sizes["sharding"] = point["layout"]
    return check_request(point["model"], **{**step, **sizes, **target})


def layouts_of(counts: Sequence[int], shardings: Sequence[str]) -> list[tuple[int, str]]:
    """Numbers of GPUs with the ways in which they divide the work; one GPU has nothing to divide."""
    ways = [name for name in shardings if name != "none"]
    for name in ways:
        if name not in SHARDINGS:
            raise unknown("sharding for --sharding", str(name), SHARDINGS)
    for count in counts:
        if not 1 <= count <= LIMITS["gpus"]:
            raise ConfigError(f"--gpus-per-run takes numbers between 1 and {LIMITS['gpus']}, got {count}")
    several = [count for count in counts if count != 1]
    if ways and not several:
        raise ConfigError(f"--sharding {ways[0]} needs --gpus-per-run of at least 2, got 1")
    if several and not ways:
        known = ", ".join(name for name in SHARDINGS if name != "none")
        raise ConfigError(f"--gpus-per-run {several[0]} needs a --sharding strategy: {known}")
    return [(count, way) for count in counts for way in (ways if count != 1 else ["none"])]


def targets_of(gpus: Sequence[str], budget: str | int | None) -> tuple[list[Gpu], int | None]:
    """The GPUs of the grid, the budget for one where none is named, and the limit on all of them.

    Raises:
        ConfigError: A name is unknown, or there is neither GPU nor budget.
    """
    limit = parse_size(budget) if isinstance(budget, str) else budget
    if gpus:
        return [load_gpu(name) for name in unique("gpus", gpus)], limit
    if limit is None:
        raise ConfigError("no GPU given: add --gpus NAME,NAME (`optplan gpus` lists them) or --budget SIZE")
    return [custom_gpu(limit)], limit


def unique(name: str, values: Sequence[Any]) -> list[Any]:
    """The values without repetitions.

    Raises:
        ConfigError: There are none.
    """
    found = list(dict.fromkeys(values))
    if not found:
        raise ConfigError(f"--{name} is empty: give at least one value")
    return found


def check_size(axes: dict[str, list[Any]]) -> None:
    """Refuse a grid that is too large for one sweep."""
    total = prod(len(values) for values in axes.values())
    if total > MAX_ROWS:
        sizes = " x ".join(f"{len(values)} {name}" for name, values in axes.items() if len(values) > 1)
        raise ConfigError(f"the grid has {total} combinations ({sizes}); at most {MAX_ROWS} are computed in one sweep")


def check_values(axes: dict[str, list[Any]], step: dict[str, Any]) -> None:
    """Refuse a value that no combination could have, before anything is computed.

    What only some combinations cannot have is said in their rows.
    """
    model, gpu = axes["model"][0], custom_gpu(2**40)
    point: dict[str, Any] = {"model": model, "gpu": gpu, "precision": "bf16", "seq_len": 1, "batch_size": 1}
    point |= {"checkpointing": "none", "layout": (1, "none")}
    for count in {count for count, _ in axes["layout"] if count != 1}:
        request_at({**point, "layout": (count, "ddp")}, {})  # what a sharding asks besides is the row's answer
    for name in ("precision", "seq_len", "batch_size", "checkpointing"):
        for value in axes[name]:
            if name == "seq_len" and type(value) is int and 1 <= value <= 2**24:
                continue  # whether a model has so many positions is the row's answer
            request_at({**point, name: value}, {})
    request_at(point, step)


def shown(axes: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The values of each axis as the report names them."""
    names: dict[str, Callable[[Any], Any]] = {
        "model": lambda model: model.name,
        "gpu": lambda gpu: gpu.id,
        "optimizer": lambda choice: choice.id,
    }
    shown = {name: [names.get(name, lambda value: value)(value) for value in values] for name, values in axes.items()}
    layouts = axes["layout"]
    divided = {"gpus": [count for count, _ in layouts], "sharding": [way for _, way in layouts]}
    order = [key for name in AXES for key in (divided if name == "layout" else (name,))]
    return {key: list(dict.fromkeys((shown | divided)[key])) for key in order}
