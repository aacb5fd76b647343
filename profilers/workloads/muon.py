"""torch's Muon as the planner describes it: hidden matrices to Muon, everything else to fused AdamW, in one step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from optplan.planner.models.spec import ModelSpec
from optplan.planner.optimizers.muon import is_hidden_matrix


class MuonWithAdamW(torch.optim.Optimizer):
    """Both as one optimizer: one state, one `step()`.

    Args:
        matrices: What Muon steps.
        others: What AdamW steps.
        lr: Learning rate of both.
        nesterov: Whether Muon looks ahead.
    """

    def __init__(
        self, matrices: Sequence[nn.Parameter], others: Sequence[nn.Parameter], *, lr: float, nesterov: bool
    ) -> None:
        super().__init__([*matrices, *others], {"lr": lr})
        muon: Any = torch.optim.Muon  # type: ignore[attr-defined, unused-ignore]  # torch has it from 2.9 on
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(muon(list(matrices), lr=lr, nesterov=nesterov))
        if others:
            self._parts.append(torch.optim.AdamW(list(others), lr=lr, fused=True))
        for part in self._parts:
            part.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step Muon's part, then AdamW's."""
        del closure
        for part in self._parts:
            part.step()


def build_muon(parameters: Sequence[nn.Parameter], spec: ModelSpec, *, lr: float, nesterov: bool) -> MuonWithAdamW:
    """Divide a module's trained parameters, or its masters in the same order, as the planner does.

    Raises:
        ImportError: This torch has no Muon.
    """
    if not hasattr(torch.optim, "Muon"):
        raise ImportError(f"torch 2.9 or later, which has Muon; this is {torch.__version__}")
    named = list(zip(spec.unique_parameters, parameters, strict=True))
    matrices = [tensor for described, tensor in named if is_hidden_matrix(described)]
    others = [tensor for described, tensor in named if not is_hidden_matrix(described)]
    return MuonWithAdamW(matrices, others, lr=lr, nesterov=nesterov)
