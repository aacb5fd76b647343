"""The loss scaling of fp16 training, with torch's own class and no values.

Source: torch `amp/grad_scaler.py`.
"""

from __future__ import annotations

from typing import Any

import torch


class TracedScaler:
    """A `torch.amp.GradScaler` that finds no infinities."""

    def __init__(self) -> None:
        self._scaler: _Scaler | None = None

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the scale."""
        if self._scaler is None:
            self._scaler = _Scaler("cuda")
        return self._scaler.scale(loss)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Step the optimizer, then adapt the scale."""
        assert self._scaler is not None
        self._scaler.step(optimizer)
        self._scaler.update()


class _Scaler(torch.amp.GradScaler):
    """Steps without asking whether a gradient is infinite."""

    def _maybe_opt_step(self, optimizer: Any, optimizer_state: Any, *args: Any, **kwargs: Any) -> Any:
        del optimizer_state
        return optimizer.step(*args, **kwargs)
