"""The step counters of a param group: one flat tensor whose elements are the per-tensor `step` of the state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

State = dict[str, Any]


class StepCounters:
    """Advances many scalar counters at once.

    Hundreds of scalar tensors are slow to add to and to read one by one, so `state["step"]` of each parameter is made a
    view of one buffer. Where somebody puts other tensors there (a loaded checkpoint), they are gathered again.
    """

    def __init__(self) -> None:
        self._views: list[torch.Tensor] = []
        self._flat = torch.empty(0)
        self.version = 0
        """Changes whenever other tensors take part, so that what was derived from the counters is stale."""

    def advance(self, states: Sequence[State]) -> list[float]:
        """Add one step to every counter.

        Args:
            states: The state of each parameter that takes part in this step.

        Returns:
            The counters after the addition; empty for counters on a GPU, which are not read back.
        """
        if len(states) != len(self._views) or any(s["step"] is not v for s, v in zip(states, self._views, strict=True)):
            self._gather(states)
        self._flat.add_(1)
        return [] if self._flat.is_cuda else self._flat.tolist()

    def _gather(self, states: Sequence[State]) -> None:
        self.version += 1
        self._flat = torch.stack([state["step"] for state in states])
        self._views = list(self._flat.unbind())
        for state, view in zip(states, self._views, strict=True):
            state["step"] = view
