"""The step counters of a param group: one flat tensor whose elements are the per-tensor `step` of the state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

State = dict[str, Any]


class StepCounters:
    """Advances many scalar counters at once.

    Hundreds of scalar tensors are slow to add to and to read one by one, so `state["step"]` of each parameter is made a
    view of one buffer. Counters on the host are read while the GPU works, for the step after; what others write to one
    in between shows in the buffer's version.

    Args:
        states: The state of each parameter that takes part in a step; at least one.
        capturable: Whether kernels read the counters.
    """

    def __init__(self, states: Sequence[State], *, capturable: bool) -> None:
        self._flat = torch.stack([state["step"] for state in states])
        self._capturable = capturable
        for state, view in zip(states, self._flat.unbind(), strict=True):
            state["step"] = view
        self._read_next()

    def begin(self) -> list[float]:
        """The number of the step about to be taken, of every counter; none where kernels read them."""
        if self._capturable:
            self._flat.add_(1)
            return []
        if self._flat._version != self._version:
            self._read_next()
        return self._next

    def finish(self) -> None:
        """Count the step that was taken."""
        if not self._capturable:
            self._flat.add_(1)
            self._read_next()

    def _read_next(self) -> None:
        self._version = self._flat._version
        self._next = [] if self._capturable else [count + 1 for count in self._flat.tolist()]
