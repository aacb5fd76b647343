"""Liger's fused linear cross entropy on tensors without contents: it asks for CUDA, and takes the way of CUDA then.

Source: Liger-Kernel `ops/fused_linear_cross_entropy.py` (0.8): the products write into memory that is there already
where input and weight are on CUDA, and the number of labels is read off the GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

_MODULE = "liger_kernel.ops.fused_linear_cross_entropy"
_CUDA, _META = torch.device("cuda", 0), torch.device("meta")
_ANSWERS: dict[Any, Any] = {torch.Tensor.device.__get__: _CUDA, torch.Tensor.item: 1}
"""What is asked of a tensor: where it is, and its value, the number of labels, on which no size depends."""


@contextmanager
def played_liger_loss(capability: tuple[int, int]) -> Iterator[None]:
    """Within the context Liger's loss takes tensors without contents for those of a GPU.

    Nothing is to be done where the loss has not been imported: the model that is run does not use it.

    Args:
        capability: Compute capability of the GPU.
    """
    module, name = sys.modules.get(_MODULE), "fused_linear_cross_entropy_forward"
    if module is None:
        yield
        return
    with (
        patch.object(module, name, _looking_like_cuda(getattr(module, name))),
        patch.object(torch.cuda, "get_device_capability", lambda *_: capability),
    ):
        yield


def _looking_like_cuda(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _LooksLikeCuda():
            return function(*args, **kwargs)

    return run


class _LooksLikeCuda(TorchFunctionMode):
    """Says that tensors without contents are on CUDA, and makes without contents what is asked for on CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one function of torch."""
        if func in _ANSWERS and args[0].is_meta:
            return _ANSWERS[func]
        args, kwargs = tree_map(_placed, (args, kwargs or {}))
        return func(*args, **kwargs)


def _placed(value: Any) -> Any:
    return _META if value == _CUDA and isinstance(value, torch.device) else value
