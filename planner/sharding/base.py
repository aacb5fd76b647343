"""What a sharding strategy says of one rank: what it keeps, what it does around a step's operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Self

import msgspec

from optplan.planner.dtypes import ITEMSIZE_BYTES, Dtype
from optplan.planner.models.spec import ModelSpec
from optplan.planner.sharding.shards import RowShard
from optplan.planner.step.hooks import StepHooks
from optplan.planner.tensors import Parameter
from optplan.planner.timeline import Category

Resident = tuple[str, int, Category]
"""Name, bytes and category of something that lives through the run."""
Sized = tuple[str, int]
"""Name and bytes."""


class Ranks(msgspec.Struct, frozen=True):
    """The processes that train together, one a GPU.

    Attributes:
        num_gpus: All of them.
        num_nodes: The machines they are on, as many on each.
        rank: The one whose memory is told, from 0.
    """

    num_gpus: int
    num_nodes: int = 1
    rank: int = 0

    @property
    def gpus_per_node(self) -> int:
        """GPUs of one machine."""
        return self.num_gpus // self.num_nodes


class ModelView(msgspec.Struct, frozen=True):
    """What a strategy needs to know of a model.

    Attributes:
        spec: The model.
        num_layers: Its layers.
        layer_name: From a layer's number to its dotted name.
        compute_dtype: Dtype of the parameters that forward and backward use.
        stored_dtype: Dtype of the parameters that the optimizer updates.
    """

    spec: ModelSpec
    num_layers: int
    layer_name: Callable[[int], str]
    compute_dtype: Dtype
    stored_dtype: Dtype

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Tied aliases left out."""
        return self.spec.unique_parameters

    @property
    def compute_itemsize(self) -> int:
        """Bytes of an element that forward and backward use."""
        return ITEMSIZE_BYTES[self.compute_dtype]

    @property
    def stored_itemsize(self) -> int:
        """Bytes of an element that the optimizer updates."""
        return ITEMSIZE_BYTES[self.stored_dtype]


class Strategy:
    """One way of dividing the work; this base keeps everything on every rank.

    Attributes:
        name: As `--sharding` takes it.
        ranks: The processes.
        offloads: Whether shards, gradients and state live on the host.
        flattens: Whether the optimizer is handed a piece of one flat tensor.
    """

    name: str = "none"
    offloads: bool = False
    flattens: bool = False

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def parameters(self, view: ModelView) -> Iterator[Sized]:
        """What stands for the parameters, in the order in which it is allocated; buffers are not among it."""
        return ((p.name, p.numel * view.compute_itemsize) for p in view.parameters)

    def kept(self, view: ModelView) -> Iterator[Resident]:
        """What the strategy keeps besides."""
        del view
        return iter(())

    def replaced(self, view: ModelView) -> Iterator[Resident]:
        """What the first step has in place of all that is kept, if it has; it may live to the second one's backward."""
        del view
        return iter(())

    def passing(self, view: ModelView) -> Iterator[int]:
        """Bytes of what is allocated once the parameters are there, one after another, at most two at once."""
        del view
        return iter(())

    def divided(self, view: ModelView) -> Iterator[tuple[int, list[int]]]:
        """How many of `parameters` in turn are made at once of whole ones, whose bytes these are and which then go."""
        del view
        return iter(())

    def gradients(self, view: ModelView) -> Iterator[Sized]:
        """Name and bytes of the gradients that backward leaves and `zero_grad` frees."""
        return ((p.name, p.numel * view.compute_itemsize) for p in view.parameters)

    def hooks(self, view: ModelView, recorded: Callable[[int], str], *, accumulates: bool) -> StepHooks:
        """What is done around the operations of a micro-step.

        Args:
            view: The model.
            recorded: From a recorded layer's number to its dotted name in the model.
            accumulates: Whether there are gradients already, to which new ones are added.
        """
        del view, recorded, accumulates
        return StepHooks()

    def updated(self, parameters: Sequence[Parameter]) -> Sequence[Parameter]:
        """Those of the model's parameters that this rank's optimizer has, whole or by their rows."""
        return parameters

    def shard(self) -> RowShard | None:
        """This rank's rows of each of them; None where it updates them whole."""
        return None

    def at(self, rank: int) -> Self:
        """The same strategy as another rank sees it."""
        other = copy(self)
        other.ranks = msgspec.structs.replace(self.ranks, rank=rank)
        return other
