"""What a step asks of the host: calls of torch from Python, launches, modules, nodes of autograd.

Counted from the real modules by `benchmarks/count_host_work.py`, for the layers of each family and for what surrounds
them; read here without torch. Only the lines of one family are parsed: the whole table would take longer than the rest
of an estimate.

Source: `data/host_work.toml`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

import msgspec

from optplan.planner.errors import DataError

COUNTED_PRECISION = {"mixed": "bf16", "fp16-amp": "amp"}
"""Precisions under which the host does what it does under another, which is counted."""
_COUNTED_ATTENTION = {"flash": "sdpa"}


class HostCalls(msgspec.Struct, frozen=True, array_like=True):
    """How often the host does what takes it time, in one micro-step or a part of it.

    Attributes:
        calls: Calls of torch from Python that return tensors, in forward; views too, if Python asks for them.
        launches: Operations below them that launch a kernel, autocast's casts among them.
        modules: Calls of modules.
        kept: Tensors that forward keeps for backward.
        waits: Times that forward reads a value off the GPU, and so waits for all that was launched before.
        nodes: Nodes of autograd that backward runs, those that take in gradients among them.
        backward_launches: Operations in backward that launch a kernel.
    """

    calls: float = 0
    launches: float = 0
    modules: float = 0
    kept: float = 0
    waits: float = 0
    nodes: float = 0
    backward_launches: float = 0

    def plus(self, other: HostCalls, times: float = 1) -> HostCalls:
        """Both, the other several times."""
        mine, others = msgspec.structs.astuple(self), msgspec.structs.astuple(other)
        return HostCalls(*(one + times * another for one, another in zip(mine, others, strict=True)))


class HostWork(msgspec.Struct, frozen=True):
    """What one micro-step of a family asks of the host.

    Attributes:
        outside: Before and after the layers: embeddings, masks, the head, the loss.
        layers: In one layer of each stack of layers.
    """

    outside: HostCalls
    layers: tuple[HostCalls, ...]

    def in_layers(self, counts: Sequence[int]) -> HostCalls:
        """In all layers, of which each stack has so many."""
        total = HostCalls()
        for layer, count in zip(self.layers, counts, strict=True):
            total = total.plus(layer, count)
        return total


@cache
def host_work(model_type: str, precision: str, attention: str) -> HostWork | None:
    """The counts of a family, None if they were not counted.

    Args:
        model_type: The family.
        precision: As `--precision` has it.
        attention: `sdpa`, `eager` or `flash`, which asks as much of the host as `sdpa`.

    Raises:
        DataError: The table is damaged.
    """
    key = f"{COUNTED_PRECISION.get(precision, precision)}-{_COUNTED_ATTENTION.get(attention, attention)}"
    row = _section(model_type).get(key)
    if row is None:
        return None
    outside, *layers = _converted(row)
    return HostWork(outside, tuple(layers))


@cache
def typical_calls() -> HostCalls:
    """Counts per launch that the step rules know of: those of modules and nodes by the median of all families.

    Raises:
        DataError: The table is damaged.
    """
    (calls,) = _converted([_section("typical").get("per_launch")])
    return calls


def _converted(row: object) -> list[HostCalls]:
    try:
        return msgspec.convert(row, list[HostCalls])
    except msgspec.ValidationError as error:
        raise DataError(f"host_work.toml is damaged: {error}") from error


@cache
def _text() -> str:
    return files("optplan.planner.data").joinpath("host_work.toml").read_text("utf-8")


def _section(name: str) -> dict[str, object]:
    """One table of the file, empty if there is none."""
    _, found, rest = _text().partition(f"\n[{name}]\n")
    try:
        return tomllib.loads(rest.partition("\n[")[0]) if found else {}
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"host_work.toml is damaged: {error}") from error
