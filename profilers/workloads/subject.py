"""What is traced: a module on the simulated device, its inputs, and how it yields a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

LossFunction = Callable[[nn.Module, Mapping[str, Any]], torch.Tensor]


def own_loss(module: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The loss that the module returns: itself, an attribute `loss`, or the first element of a tuple."""
    output = module(**inputs)
    if isinstance(output, torch.Tensor):
        return output
    loss = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
    if not isinstance(loss, torch.Tensor):
        raise TypeError(f"the module must return a loss, got {type(output).__name__}")
    return loss


class Subject(NamedTuple):
    """A module to be trained for a few steps without contents.

    Attributes:
        module: In training mode, all parameters and buffers on the meta device.
        inputs: Arguments by name of one micro-batch.
        loss: Runs the module on the inputs.
        head: The module whose output is the logits, where it is known; what follows it belongs to the loss.
        context: Makes a context manager that has to be entered while the module runs.
    """

    module: nn.Module
    inputs: Mapping[str, Any]
    loss: LossFunction = own_loss
    head: nn.Module | None = None
    context: Callable[[], AbstractContextManager[None]] = nullcontext

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters by name that need gradients, those shared once."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}


def placed_tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers in the order in which `module.to(device)` places them: children first."""
    for name, child in module.named_children():
        yield from placed_tensors(child, f"{prefix}{name}.")
    yield from ((f"{prefix}{name}", p) for name, p in module.named_parameters(recurse=False))
    yield from ((f"{prefix}{name}", b) for name, b in module.named_buffers(recurse=False))
