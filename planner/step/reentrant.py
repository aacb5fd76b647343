"""Reentrant checkpoints: a part of the model without a graph, which backward runs again before it runs it backward.

Source: torch `utils/checkpoint.py` (`CheckpointFunction`); pytorch `torch/csrc/autograd/python_function.cpp`
(`PyNode::apply`, which makes zeros of gradients that nobody has asked for), `functions/accumulate_grad.h`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from optplan.planner.step.graph import LAST, Node, Storage, Tensor, hold

if TYPE_CHECKING:
    from optplan.planner.step.tape import Tape

Function = Callable[..., Sequence[Tensor]]
Gradients = list[Tensor | None]


def checkpoint_whole(t: Tape, function: Function, arguments: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Run `function` without a graph; backward will run it again from end to end, then that graph backward."""
    inputs = [x for x in arguments if x is not None]
    kinds = [x and Tensor(None, x.numel, x.dtype, x.node, 0, x.permuted) for x in arguments]
    results: list[Tensor] = []

    def backward(gradients: Gradients) -> Gradients:
        _fill_with_zeros(t, gradients, results)
        found = _recompute(t, function, kinds, saved, gradients)
        _release_last_first(gradients)
        return [found.get(index) for index, kind in enumerate(kinds) if kind is not None]

    node = t.node(inputs, backward, inputs)  # type: ignore[arg-type]
    saved = node.saved
    t.keeps_graph = False
    outputs = function(*arguments)
    t.keeps_graph = True
    results += [Tensor(None, x.numel, x.dtype) for x in outputs]
    node.gradients = [None] * len(outputs)
    return tuple(Tensor(x.storage, x.numel, x.dtype, node, i, x.permuted) for i, x in enumerate(outputs))


def _fill_with_zeros(t: Tape, gradients: Gradients, results: Sequence[Tensor]) -> None:
    for index, result in enumerate(results):
        if gradients[index] is None:
            zeros = t.new(result.numel, result.dtype, "gradient of zeros")
            assert zeros.storage is not None
            zeros.storage.holders += 1
            gradients[index] = zeros


def _release_last_first(gradients: Gradients) -> None:
    """Let go of the gradients as Python lets go of a tuple."""
    for index in reversed(range(len(gradients))):
        gradient, gradients[index] = gradients[index], None
        assert gradient is not None
        if gradient.storage is not None:
            gradient.storage.holders -= 1


def _recompute(
    t: Tape,
    function: Function,
    kinds: Sequence[Tensor | None],
    saved: Sequence[Storage | None],
    gradients: Gradients,
) -> dict[int, Tensor]:
    """The gradients of the arguments by their index."""
    found: dict[int, Tensor] = {}
    storages = iter(saved)
    arguments = [kind and _detached(t, kind, next(storages), index, found) for index, kind in enumerate(kinds)]
    t.category = "activations"
    outputs = function(*arguments)
    t.casts.clear()
    roots: list[Node] = []
    for output, gradient in zip(outputs, gradients, strict=True):
        if output.node is not None and gradient is not None:
            hold(output.node, output.output, gradient)
            roots.append(output.node)
    t.run_from([node for node in dict.fromkeys(roots) if node.waiting == 0])
    return found


def _detached(t: Tape, kind: Tensor, storage: Storage | None, index: int, found: dict[int, Tensor]) -> Tensor:
    """An argument outside the graph; if it asks for a gradient, that will be found, laid out as the argument is."""
    permuted = kind.permuted

    def keep(gradients: list[Tensor]) -> tuple[()]:
        found[index] = gradients[0]
        if gradients[0].permuted != permuted:
            found[index] = t.new(gradients[0].numel, gradients[0].dtype, "gradient laid out anew", permuted=permuted)
        return ()

    return Tensor(storage, kind.numel, kind.dtype, kind.node and Node(LAST, keep, 1), 0, permuted)
