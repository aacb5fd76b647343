"""The parts of a recorded step: memory and its lifetime, tensors without contents, the graph that autograd would keep.

Memory lives exactly as long as something refers to it: a local variable of the rules, a node that saved it, a gradient
on its way. CPython's reference counts, on which torch relies too, end a `Storage`, and that is noted among the events.

Source: pytorch `torch/csrc/autograd/function.h` and `saved_variable.h`; `torch/utils/checkpoint.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from optplan.planner.dtypes import Dtype
from optplan.planner.timeline import Category, Phase

LAST = 1 << 60
"""Sequence number of the nodes that add up parameters' gradients: they run as soon as they can."""


class Record(NamedTuple):
    """One allocation.

    Attributes:
        num_bytes: Bytes requested.
        category: What the memory is for.
        layer: Layer it is made in, None outside the layers.
        path: Module it is made in, within its layer.
        operation: What makes it.
        itemsize: Bytes of one element where it is a tensor, 1 where it is scratch.
        stream: Stream that it is made on.
    """

    num_bytes: int
    category: Category
    layer: int | None
    path: str
    operation: str
    itemsize: int = 1
    stream: int = 0


class Segment(NamedTuple):
    """A stretch of the tape: one layer's forward or backward, or what lies before, between and after the layers."""

    phase: Phase
    layer: int | None
    first_event: int
    first_id: int


class Storage:
    """Allocated memory; it ends when nothing refers to it any more.

    Attributes:
        id: Number of the allocation on the tape.
        holders: Buffers of backward that hold a gradient in this memory.
    """

    __slots__ = ("_events", "holders", "id")

    def __init__(self, events: list[int], id_: int) -> None:
        self._events = events
        self.id = id_
        self.holders = 0

    def __del__(self) -> None:
        self._events.append(-self.id)


class Tensor:
    """A tensor as far as memory goes.

    Attributes:
        storage: Its memory, None for parameters and buffers, which are resident.
        numel: Elements.
        dtype: Element type.
        node: What computed it, or for a parameter what adds up its gradient; None if no gradient is asked for.
        output: Which output of `node` it is.
        permuted: Whether joining its heads into one dimension takes a copy.
        is_view: Whether it reshapes the memory of another tensor; such a gradient is never added to in place.
    """

    __slots__ = ("dtype", "is_view", "node", "numel", "output", "permuted", "storage")

    def __init__(
        self,
        storage: Storage | None,
        numel: int,
        dtype: Dtype,
        node: Node | None = None,
        output: int = 0,
        permuted: bool = False,
        is_view: bool = False,
    ) -> None:
        self.storage = storage
        self.numel = numel
        self.dtype = dtype
        self.node = node
        self.output = output
        self.permuted = permuted
        self.is_view = is_view

    def view(self, *, permuted: bool = False) -> Tensor:
        """The same memory in another shape, outside any graph."""
        return Tensor(self.storage, self.numel, self.dtype, None, 0, permuted, True)


BackwardRule = Callable[[list[Tensor]], Sequence[Tensor | None]]
"""From the gradients of a node's outputs to those of its inputs, in the inputs' order."""


class Node:
    """One operation in the graph.

    Attributes:
        sequence: Order of creation; of the nodes that are ready, backward runs the latest.
        rule: What backward does.
        edges: The nodes that the inputs' gradients go to, and which output of theirs each input was.
        sizes: Elements of each input; a larger gradient is summed.
        dtypes: Dtype of each input; a gradient of another is cast.
        broadcast: Index of the input, if any, that is the same in every row: its gradient is summed over the rows.
        saved: Memory kept for backward, in the order in which it is let go.
        frame: The checkpoint that recomputes the saved memory instead of keeping it, and the node's range in it.
        gradients: Gradients of the outputs that have arrived.
        waiting: Gradients still to arrive.
        layer: Layer of the operation, None outside the layers.
        path: Module of the operation, within its layer.
        category: What its memory is for.
        before: Called when backward is about to run it.
    """

    __slots__ = (
        "before", "broadcast", "category", "dtypes", "edges", "frame", "gradients", "layer", "path", "rule", "saved",
        "sequence", "sizes", "waiting",
    )  # fmt: skip

    def __init__(self, sequence: int, rule: BackwardRule, num_outputs: int) -> None:
        self.sequence = sequence
        self.rule = rule
        self.layer: int | None = None
        self.path = ""
        self.category: Category = "activations"
        self.edges: list[tuple[Node, int] | None] = []
        self.sizes: list[int] = []
        self.dtypes: list[Dtype] = []
        self.broadcast: int | None = None
        self.saved: list[Storage | None] = []
        self.frame: tuple[Checkpoint, int, int] | None = None
        self.gradients: list[Tensor | None] = [None] * num_outputs
        self.waiting = 0
        self.before: Callable[[], object] | None = None

    def __lt__(self, other: Node) -> bool:
        return self.sequence > other.sequence

    def category_of(self, index: int) -> Category:
        """What the memory of an input's gradient is for."""
        edge = self.edges[index]
        return "gradients" if edge is not None and edge[0].sequence == LAST else self.category


class Checkpoint:
    """A part of the graph whose saved memory is dropped and recomputed when backward first asks for it."""

    __slots__ = ("count", "recompute", "recomputed")

    def __init__(self, recompute: Callable[[], object]) -> None:
        self.recompute = recompute
        self.count = 0
        self.recomputed: list[Storage | None] | None = None


def hold(node: Node, output: int, gradient: Tensor) -> None:
    """Put a gradient of one of the node's outputs where backward will find it."""
    node.gradients[output] = gradient
    if gradient.storage is not None:
        gradient.storage.holders += 1


def release(gradients: list[Tensor | None]) -> None:
    """Let go of the gradients that a node has used, the first one first."""
    for index in range(len(gradients)):
        gradient, gradients[index] = gradients[index], None
        if gradient is not None and gradient.storage is not None:
            gradient.storage.holders -= 1
