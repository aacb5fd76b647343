"""Where autograd writes into memory that it already holds, on real tensors, but not while a dispatch mode watches.

Autograd adds a gradient in place when nothing else can see the sum's first term. It never does so to tensors that look
like subclasses, as every tensor does under a dispatch mode, so that a traced step would hold a second copy of many
gradients. The same goes for a few formulas, and for the mask that the unfused attention adds to its scores.

Source: pytorch `torch/csrc/autograd/input_buffer.cpp` (`can_accumulate_inplace`), `functions/accumulate_grad.h`,
`FunctionsManual.cpp` and `native/transformers/attention.cpp` (branches on `areAnyTensorSubclassLike`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

aten = torch.ops.aten

_FORMULAS: dict[Any, tuple[str, ...]] = {
    aten.scatter_add.default: ("GatherBackward0",),
    aten.index_put.default: ("IndexBackward0",),
    aten.scatter.src: ("MaxBackward0", "MinBackward0", "TopkBackward0", "SortBackward0"),
}
_KEPT_GRADIENT = "torch::autograd::AccumulateGrad"

_OWN_STORAGE_USES, _OWN_TENSOR_USES = 2, 4
"""References to a gradient that only the engine holds, and to its storage, as a dispatch mode counts them."""


_overwrites_sums = False


@contextmanager
def overwriting_sums() -> Iterator[None]:
    """Within the context a sum made by the forward overwrites its first term."""
    global _overwrites_sums
    _overwrites_sums = True
    try:
        yield
    finally:
        _overwrites_sums = False


def overwritten(func: Any, args: tuple[Any, ...], node: Any) -> torch.Tensor | None:
    """The argument into which a real step would write the result of `func`, None if it makes a new tensor.

    Args:
        func: The operation, run while `node` is.
        args: Its arguments.
        node: The autograd node that is running, None in the forward.
    """
    if node is None:
        return args[0] if _overwrites_sums and func is aten.add.Tensor else None
    if func is aten.add.Tensor:
        return _sum_target(args, node)
    nodes = _FORMULAS.get(func)
    if nodes is not None and node.name() in nodes:
        return args[0]  # type: ignore[no-any-return]
    return None


def _sum_target(args: tuple[Any, ...], node: Any) -> torch.Tensor | None:
    first, second = args
    if not isinstance(second, torch.Tensor) or first.shape != second.shape or first.dtype != second.dtype:
        return None
    if node.name() == _KEPT_GRADIENT:
        return first  # type: ignore[no-any-return]
    storage = first.untyped_storage()
    owned = torch._C._storage_Use_Count(storage._cdata) <= _OWN_STORAGE_USES
    if owned and first._use_count() <= _OWN_TENSOR_USES and _is_dense(first):
        return first  # type: ignore[no-any-return]
    return None


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their memory in some order of the dimensions, without gaps or overlaps."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
