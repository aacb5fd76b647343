"""Whose memory it is: the storages of parameters, gradients and optimizer state by the address they begin at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from optplan.planner.timeline import Category


class Owner(NamedTuple):
    """What a storage is for, and the name of the tensor that it was made for."""

    category: Category
    name: str


class Owners:
    """Finds the owners of storages for one model and optimizer.

    Attributes:
        parameters: The model's parameters by name, one that is shared once.
        masters: What the optimizer steps besides: fp32 copies that the caller keeps.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        name_gradient: Callable[[str, nn.Parameter], str] = lambda name, _: name,
    ) -> None:
        """Remember the names of the parameters.

        Args:
            model: Whose parameters they are.
            optimizer: Steps them, or copies of them.
            name_gradient: Names a gradient's memory by the parameter's name and the parameter: DDP and FSDP2 keep the
                gradients of several in one piece.
        """
        # ZeroRedundancyOptimizer keeps an optimizer of its own for this rank's part.
        self._optimizer: torch.optim.Optimizer = getattr(optimizer, "optim", optimizer)
        self._name_gradient = name_gradient
        self.parameters = dict(model.named_parameters())
        self._buffers = dict(model.named_buffers())
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.masters = {
            f"master weight {index}": parameter for index, parameter in enumerate(stepped) if id(parameter) not in names
        }
        self._names = names | {id(parameter): name for name, parameter in self.masters.items()}

    def weights(self) -> Iterator[tuple[torch.Tensor, Owner]]:
        """Parameters, buffers and master weights."""
        for name, tensor in (*self.parameters.items(), *self._buffers.items()):
            yield tensor, Owner("parameters", name)
        for name, tensor in self.masters.items():
            yield tensor, Owner("master_weights", name)

    def gradients(self) -> Iterator[tuple[torch.Tensor, Owner]]:
        """The gradients that there are now."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                yield parameter.grad, Owner("gradients", self._name_gradient(name, parameter))
        for name, parameter in self.masters.items():
            if parameter.grad is not None:
                yield parameter.grad, Owner("gradients", name)

    def state(self) -> Iterator[tuple[torch.Tensor, Owner, str]]:
        """The optimizer's state tensors that there are now, with the name of the state."""
        for parameter, state in self._optimizer.state.items():
            parameter_name = self._names.get(id(parameter), "optimizer")
            for key, value in _tensors(state):
                yield value, Owner("optimizer_state", f"{parameter_name} {key}"), key

    def by_address(self, device: torch.device) -> dict[int, Owner]:
        """Every storage on the device that has an owner now, by address; the first owner of one that is shared."""
        owned: dict[int, Owner] = {}
        for tensor, owner in (*self.weights(), *self.gradients(), *((t, o) for t, o, _ in self.state())):
            for local in parts_of(tensor):
                if local.device == device:
                    owned.setdefault(local.untyped_storage().data_ptr(), owner)
        return owned


def storage_bytes(tensors: Iterator[torch.Tensor], device: torch.device) -> int:
    """Unrounded bytes of the tensors on the device, a storage that several share counted once."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        for local in parts_of(tensor):
            if local.device == device:
                storage = local.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def parts_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors with memory that a tensor consists of: itself, a DTensor's local shard, a subclass's parts."""
    if hasattr(tensor, "to_local"):
        yield from parts_of(tensor.to_local())
    elif hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from parts_of(getattr(tensor, name))
    elif tensor.numel():
        yield tensor


def _tensors(state: object, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors anywhere in a state's dictionaries and lists, by the name of the outermost entry."""
    if isinstance(state, torch.Tensor):
        yield prefix, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from _tensors(value, prefix or str(key))
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value, prefix)
