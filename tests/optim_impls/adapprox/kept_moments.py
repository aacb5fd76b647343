"""How well factors hold the second moment of a training, beside those of the paper's mode on the same gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Kept(NamedTuple):
    """Relative errors of one matrix's factors against its whole second moment in float64.

    Attributes:
        shape: Of the parameter.
        ours: Of the training's factors.
        paper: Of the paper's mode in float64: five iterations from noise at every step.
    """

    shape: tuple[int, ...]
    ours: float
    paper: float


def product(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """Q Uᵀ in float64."""
    return state["q_factor"].double() @ state["u_factor"].double().mT


def error(moment: torch.Tensor, state: dict[str, torch.Tensor]) -> float:
    """||V - Q Uᵀ|| / ||V|| in Frobenius norm."""
    return float((moment - product(state)).norm() / moment.norm())


def kept_after(training: Any, subject: Any, num_steps: int) -> list[Kept]:
    """The errors of every matrix after so many steps.

    Both optimizers know of the second moment before a step only the factors that they kept of it, so what either leaves
    out at a step is lost to it. Factors of the whole second moment, which neither has, are better than the paper's.
    """
    theirs = [torch.nn.Parameter(p.detach().double()) for p in training.parameters]
    paper = subject.build(theirs, backend="torch", mode="paper")
    whole = [torch.zeros_like(p) for p in theirs]
    for _ in range(num_steps):
        training.run(1)
        for ours, other, moment in zip(training.parameters, theirs, whole, strict=True):
            other.grad = ours.grad.double()
            moment.mul_(0.999).addcmul_(other.grad, other.grad, value=0.001)
        paper.step()
    found = []
    for ours, other, moment in zip(training.parameters, theirs, whole, strict=True):
        states = training.optimizer.state[ours], paper.state[other]
        if "q_factor" in states[0]:
            errors = (error(moment.detach().view(len(moment), -1), state) for state in states)
            found.append(Kept(tuple(ours.shape), *errors))
    return found
