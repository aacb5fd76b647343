"""A recorder of one training step: operations as they allocate, the graph they leave, and its backward pass.

The rules of a model run its operations on `Tensor`s. Each operation notes the allocations of its kernels on the `Tape`
and leaves a `Node` that knows what the operation's backward allocates and which memory it keeps until then. A rule
keeps and drops its variables where the modelling code does: see `graph` for how memory ends.

Source: pytorch `torch/csrc/autograd/engine.cpp` (order of the nodes, `validate_outputs`), `input_buffer.cpp` (in-place
accumulation), `functions/accumulate_grad.h`, `torch/utils/checkpoint.py` (recomputation, reentrant or not).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from heapq import heapify, heappop, heappush
from typing import TypeVar

from optplan.planner.dtypes import ITEMSIZE_BYTES, Dtype
from optplan.planner.reductions import column_reduction_bytes
from optplan.planner.step.graph import (
    LAST,
    BackwardRule,
    Checkpoint,
    Node,
    Record,
    Segment,
    Storage,
    Tensor,
    hold,
    release,
)
from optplan.planner.step.hooks import StepHooks
from optplan.planner.step.reentrant import checkpoint_whole
from optplan.planner.timeline import Category, Phase

Result = TypeVar("Result")


class _EnoughRecomputedError(Exception):
    """All that backward will ask for has been recomputed."""


class Tape:
    """Records allocations and frees, builds the graph and runs it backward.

    Attributes:
        events: Ids of the allocations in the order in which they are made; negative where they end.
        records: The allocation with id `n` at index `n - 1`.
        segments: The stretches of the tape, in order.
        gradients: Ids of the parameters' gradients by layer and name within it.
        layer: The layer whose operations are being recorded.
        path: The module whose operations are being recorded, within its layer.
        category: What their memory is for.
        resident_threads: Threads that the GPU holds at once; they decide how sums are split.
        parameter_dtype: Dtype of the parameters.
        autocast: Dtype in which matrix products run under `torch.autocast`, None outside it.
        casts: Parameters that autocast has cast already.
        hooks: What is done around the step's operations.
        keeps_graph: Whether operations leave a graph; not so inside a checkpoint that is recomputed as a whole.
    """

    def __init__(
        self,
        *,
        resident_threads: int,
        parameter_dtype: Dtype,
        autocast: Dtype | None = None,
        keeps_gradients: bool = False,
        drops_gradients: bool = False,
        has_one_token: bool = False,
        hooks: StepHooks | None = None,
    ) -> None:
        """Start empty.

        Args:
            resident_threads: As the attribute.
            parameter_dtype: As the attribute.
            autocast: As the attribute.
            keeps_gradients: Whether parameters have gradients already, to which new ones are added.
            drops_gradients: Whether each gradient is used up as soon as it is there.
            has_one_token: Whether sequences have a single token: then joining heads never takes a copy.
            hooks: What is done around the step's operations; nothing if left out.
        """
        self.parameter_dtype = parameter_dtype
        self.autocast = autocast
        self.casts: dict[tuple[int | None, str], Tensor] = {}
        self.events: list[int] = []
        self.records: list[Record] = []
        self.segments: list[Segment] = []
        self.gradients: dict[tuple[int | None, str], int] = {}
        self._kept_gradients: list[Storage] = []
        self.layer: int | None = None
        self.path = ""
        self.category: Category = "activations"
        self.resident_threads = resident_threads
        self.keeps_graph = True
        self.hooks = hooks or StepHooks()
        self._keeps_gradients = keeps_gradients
        self._drops_gradients = drops_gradients
        self._has_one_token = has_one_token
        self._parameters: dict[tuple[int | None, str], Node] = {}
        self._sequence = 0
        self._frame: Checkpoint | None = None
        self._recomputing: Checkpoint | None = None
        self._phase: Phase = "forward"
        self._begin_segment(None)

    def enter(self, layer: int | None) -> None:
        """Record the operations of `layer` from here on; None for what is outside the layers."""
        self.layer = layer
        self._begin_segment(layer)

    def _begin_segment(self, layer: int | None) -> None:
        self.segments.append(Segment(self._phase, layer, len(self.events), len(self.records) + 1))

    def storage(
        self, num_bytes: int, operation: str, category: Category | None = None, *, itemsize: int = 1, stream: int = 0
    ) -> Storage:
        """Allocate memory for an operation of the current module."""
        category = category or self.category
        self.records.append(Record(num_bytes, category, self.layer, self.path, operation, itemsize, stream))
        id_ = len(self.records)
        self.events.append(id_)
        return Storage(self.events, id_)

    def new(
        self, numel: int, dtype: Dtype, operation: str, category: Category | None = None, *, permuted: bool = False
    ) -> Tensor:
        """Allocate a tensor; one without elements takes no memory."""
        if numel == 0:
            return Tensor(None, 0, dtype)
        itemsize = ITEMSIZE_BYTES[dtype]
        storage = self.storage(numel * itemsize, operation, category, itemsize=itemsize)
        return Tensor(storage, numel, dtype, None, 0, permuted and not self._has_one_token)

    def scratch(self, *sizes: int, operation: str) -> None:
        """Allocate what a kernel uses while it runs; let go in the reverse order."""
        held = [self.storage(num_bytes, operation, "workspace") for num_bytes in sizes]
        while held:
            held.pop()

    def parameter(self, name: str, numel: int) -> Tensor:
        """A parameter of the current layer; its gradient will be kept under the layer and `name`."""
        key = (self.layer, name)
        node = self._parameters.get(key)
        if node is None:
            node = Node(LAST, lambda gradients: self._keep_gradient(key, gradients), 1)
            node.path, node.category = name, "gradients"
            self._parameters[key] = node
        return Tensor(None, numel, self.parameter_dtype, node)

    def node(
        self, inputs: Sequence[Tensor], rule: BackwardRule, saved: Sequence[Tensor] = (), *, num_outputs: int = 1
    ) -> Node:
        """Add an operation on `inputs` to the graph, keeping `saved`.

        Call it before the output is made: torch saves inputs before it computes.
        """
        self._sequence += 1
        node = Node(self._sequence, rule, num_outputs)
        node.layer, node.path, node.category = self.layer, self.path, self.category
        if not self.keeps_graph:
            return node
        for tensor in inputs:
            edge = tensor.node
            node.edges.append(None if edge is None else (edge, tensor.output))
            node.sizes.append(tensor.numel)
            node.dtypes.append(tensor.dtype)
            if edge is not None and self._recomputing is None:
                edge.waiting += 1
        self.save(node, saved)
        return node

    def save(self, node: Node, saved: Sequence[Tensor]) -> None:
        """Keep more for a node's backward: results, once they are made."""
        if not saved or not self.keeps_graph:
            return
        storages = [tensor.storage for tensor in saved]
        if self._recomputing is not None:
            self._keep_recomputed(self._recomputing, storages)
        elif self._frame is not None:
            first = self._frame.count if node.frame is None else node.frame[1]
            self._frame.count += len(storages)
            node.frame = (self._frame, first, self._frame.count)
        else:
            node.saved += storages

    def checkpoint(self, function: Callable[[Tensor], Result], argument: Tensor) -> Result:
        """Run `function` keeping only `argument`; backward will run it again for what it saves."""
        again = Tensor(argument.storage, argument.numel, argument.dtype, Node(0, tuple, 1))
        self._frame = Checkpoint(lambda: function(again))
        output = function(argument)
        self._frame = None
        return output

    def checkpoint_whole(self, function: Callable[[Tensor], Tensor], argument: Tensor) -> Tensor:
        """Run `function` without a graph; backward will run it again from end to end, then that graph backward."""
        (output,) = checkpoint_whole(self, lambda x: (function(x),), (argument,))
        return output

    def _keep_recomputed(self, frame: Checkpoint, storages: list[Storage | None]) -> None:
        assert frame.recomputed is not None
        frame.recomputed += storages
        if len(frame.recomputed) == frame.count:
            raise _EnoughRecomputedError

    def backward(self, loss: Tensor) -> None:
        """Run the graph behind `loss` backward, leaving the parameters' gradients in `gradients`."""
        assert loss.node is not None
        self._phase = "backward"
        self.enter(None)
        self.path, self.category = loss.node.path, loss.node.category
        seed = self.new(loss.numel, loss.dtype, "gradient")
        hold(loss.node, 0, seed)
        self.run_from([loss.node])
        if self.layer is not None:
            # What is handed on to a later stage of a pipeline lives to the end, outside the layers.
            self.enter(None)
        self.hooks.after_backward(self)
        del seed
        # The parameters' nodes refer to the tape: without them it ends when nothing else refers to it.
        self._parameters.clear()

    def run_from(self, ready: list[Node]) -> None:
        """Run backward all that can be reached from nodes that have their gradients."""
        heapify(ready)
        while ready:
            node = heappop(ready)
            if node.layer != self.layer and node.sequence != LAST:
                self.enter(node.layer)
            self._run(node, ready)

    def _run(self, node: Node, ready: list[Node]) -> None:
        if node.before is not None:
            node.before()
        recomputed = self._unpack(node)
        self.path, self.category = node.path, node.category
        gradients, node.gradients = node.gradients, []
        results = list(node.rule(gradients))  # type: ignore[arg-type]
        recomputed.clear()
        for index in range(len(results)):
            results[index] = self._reduced(results[index], node, index)
            results[index] = self._cast(results[index], node, index)
        release(gradients)
        for index in range(len(node.saved)):
            node.saved[index] = None
        node.frame = None
        for index, edge in enumerate(node.edges):
            if edge is not None:
                self._deliver(edge, results[index], ready)
                results[index] = None

    def _reduced(self, gradient: Tensor | None, node: Node, index: int) -> Tensor | None:
        """The gradient summed to the size of the input that was broadcast."""
        size = node.sizes[index]
        if gradient is None or (gradient.numel == size and index != node.broadcast):
            return gradient
        total = self.new(size, gradient.dtype, "gradient", node.category_of(index))
        if index == node.broadcast:
            rows = gradient.numel // size
            buffers = column_reduction_bytes(rows, size, resident_threads=self.resident_threads)
            self.scratch(*filter(None, buffers), operation="sum of the gradient")
        return total

    def _cast(self, gradient: Tensor | None, node: Node, index: int) -> Tensor | None:
        """The gradient in the dtype of the input it belongs to."""
        dtype = node.dtypes[index]
        if gradient is None or gradient.dtype == dtype:
            return gradient
        return self.new(gradient.numel, dtype, "gradient", node.category_of(index), permuted=gradient.permuted)

    def _deliver(self, edge: tuple[Node, int], gradient: Tensor | None, ready: list[Node]) -> None:
        node, output = edge
        if gradient is not None:
            held = node.gradients[output]
            if held is None:
                hold(node, output, gradient)
            elif held.is_view or held.storage is None or held.storage.holders > 1:
                total = self.new(held.numel, held.dtype, "sum of gradients", node.category, permuted=held.permuted)
                hold(node, output, total)
                del total
                if held.storage is not None:
                    held.storage.holders -= 1
        node.waiting -= 1
        if node.waiting == 0:
            heappush(ready, node)

    def _keep_gradient(self, key: tuple[int | None, str], gradients: list[Tensor]) -> tuple[()]:
        storage = gradients[0].storage
        assert storage is not None
        if self.hooks.takes_gradient(self, key, storage):
            return ()
        if self._keeps_gradients:
            return ()
        if storage.holders > 1 and not gradients[0].is_view:
            # Another operation is yet to read the very same tensor.
            copy = self.new(gradients[0].numel, gradients[0].dtype, "gradient", "gradients").storage
            assert copy is not None
            storage = copy
        self.keep_gradient(key, storage)
        return ()

    def keep_gradient(self, key: tuple[int | None, str], storage: Storage) -> None:
        """Note where the gradient called `key` lies, and let it live on unless it is used up at once."""
        self.gradients[key] = storage.id
        if not self._drops_gradients:
            self._kept_gradients.append(storage)

    @property
    def is_recomputing(self) -> bool:
        """Whether the forward of a checkpoint is being run again."""
        return self._recomputing is not None

    def _unpack(self, node: Node) -> list[Storage | None]:
        """The node's part of a checkpoint, recomputed if it is the first to ask; empty outside checkpoints."""
        if node.frame is None:
            return []
        frame, first, end = node.frame
        if frame.recomputed is None:
            self._recompute(frame)
        assert frame.recomputed is not None
        part = frame.recomputed[first:end]
        frame.recomputed[first:end] = [None] * (end - first)
        return part

    def _recompute(self, frame: Checkpoint) -> None:
        frame.recomputed = []
        self._recomputing = frame
        self.category = "activations"
        with suppress(_EnoughRecomputedError):
            frame.recompute()
        self._recomputing = None
        self.casts.clear()
