"""The step counters of a param group: one flat tensor whose elements are the per-tensor `step` of the state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

State = dict[str, Any]


class StepCounters:
    """Advances many scalar counters at once.

    Hundreds of scalar tensors are slow to add to and to read one by one, so `state["step"]` of each parameter is made a
    view of one buffer.

    Args:
        states: The state of each parameter that takes part in a step; at least one.
    """

    def __init__(self, states: Sequence[State]) -> None:
        self._flat = torch.stack([state["step"] for state in states])
        for state, view in zip(states, self._flat.unbind(), strict=True):
            state["step"] = view

    def advance(self) -> list[float]:
        """Add one step to every counter and return them; none for counters on a GPU, which are not read back."""
        self._flat.add_(1)
        return [] if self._flat.is_cuda else self._flat.tolist()
