"""What the plan of a step rests on, read from every tensor at every step: loops in C, so that the GPU does not wait."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, compress, repeat
from operator import attrgetter, is_, is_not
from typing import Any

import torch

from optplan.optim_impls.checks import check_gradient

_GRADIENT, _DTYPE = attrgetter("grad"), attrgetter("dtype")
_PLAIN = {torch.Tensor, torch.nn.Parameter}


class Fingerprint:
    """Where the tensors of a param group lie, and what may change of a gradient that stays in its place.

    Step counters, views of a buffer of ours, are told by their identity alone: each tensor that is looked into costs
    the host several misses of its caches before the GPU has anything to do.

    Args:
        optimizer: Name of the class, for errors.
        params: The parameters of the group.
        states: The state of each parameter that has a gradient.
    """

    def __init__(self, optimizer: str, params: Sequence[torch.Tensor], states: Sequence[dict[str, Any]]) -> None:
        self._optimizer = optimizer
        self._params = list(params)
        self._states = list(states)
        gradients = list(map(_GRADIENT, params))
        self._present = list(map(is_not, gradients, repeat(None)))
        self._all_present = all(self._present)
        gradients = list(compress(gradients, self._present))
        self._taking = list(compress(params, self._present))
        self._values = list(chain.from_iterable(map(dict.values, states)))
        counters = {id(state["step"]) for state in states}
        self._moments = [value for value in self._values if id(value) not in counters]
        self._plain = set(map(type, chain(self._taking, gradients, self._moments))) <= _PLAIN
        self._read = self._of(gradients)

    def holds(self, params: Sequence[torch.Tensor]) -> bool:
        """Whether nothing moved since."""
        if not same_objects(params, self._params):
            return False
        if not same_objects(chain.from_iterable(map(dict.values, self._states)), self._values):
            return False
        gradients: Any = list(map(_GRADIENT, params))
        if list(map(is_not, gradients, repeat(None))) != self._present:
            return False
        if not self._all_present:
            gradients = list(compress(gradients, self._present))
        return self._of(gradients) == self._read

    def _of(self, gradients: list[torch.Tensor]) -> list[Any]:
        tensors = chain(self._taking, gradients, self._moments)
        if not self._plain:
            gradients = list(map(local_tensor, gradients))
            pointers = list(map(_address, tensors))
        else:
            try:
                pointers = list(map(torch.Tensor.data_ptr, tensors))
            except RuntimeError:  # of a sparse gradient
                for gradient in gradients:
                    check_gradient(self._optimizer, gradient)
                raise
        return [pointers, list(map(_DTYPE, gradients)), list(map(torch.Tensor.is_contiguous, gradients))]


def same_objects(ours: Iterable[Any], known: Sequence[Any]) -> bool:
    """Whether both hold the same objects in the same order."""
    ours = list(ours)
    return len(ours) == len(known) and all(map(is_, ours, known))


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor's shard on this rank, anything else as it is."""
    shard = getattr(tensor, "_local_tensor", None)
    return tensor if shard is None else shard


def _address(value: Any) -> Any:
    return local_tensor(value).data_ptr() if isinstance(value, torch.Tensor) else value
