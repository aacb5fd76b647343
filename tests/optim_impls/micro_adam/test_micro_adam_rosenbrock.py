"""The paper's first figure: on the Rosenbrock function, error feedback gives TopK-Adam Adam's path back.

Adam on the larger of the two gradients alone leaves the valley; with error feedback it goes Adam's way again.

Source: Modoranu et al., arXiv 2405.15593, figure 1.
"""

from __future__ import annotations

import torch

from optplan.optim_impls import MicroAdam

START, LR, STEPS = (-0.5, 1.0), 0.02, 4000


def _gradient(at: torch.Tensor) -> torch.Tensor:
    x, y = at.tolist()
    return torch.tensor([-2 * (1 - x) - 400 * x * (y - x * x), 200 * (y - x * x)], dtype=torch.float64)


def _path(compress: str) -> torch.Tensor:
    """Points `[steps, 2]` of Adam on the gradient: `none`, `topk` (one of the two), or `feedback`."""
    point, error = torch.tensor(START, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    m, v, points = torch.zeros_like(point), torch.zeros_like(point), []
    for step in range(1, STEPS + 1):
        accumulated = _gradient(point) + (error if compress == "feedback" else 0)
        kept = accumulated.clone()
        if compress != "none":
            kept[accumulated.abs().argmin()] = 0
        error = accumulated - kept
        m, v = 0.9 * m + 0.1 * kept, 0.999 * v + 0.001 * kept**2
        point = point - LR * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        points.append(point)
    return torch.stack(points)


def test_error_feedback_restores_the_path_of_adam() -> None:
    adam, topk, feedback = (_path(compress) for compress in ("none", "topk", "feedback"))

    def loss(points: torch.Tensor) -> torch.Tensor:
        x, y = points.unbind(1)
        return (1 - x) ** 2 + 100 * (y - x * x) ** 2

    assert loss(adam)[-1] < 1e-6
    assert loss(feedback)[-1] < 1e-4
    assert loss(topk)[-1] > 10 * loss(feedback)[-1]
    # How far each strays from Adam's path at the same step.
    astray, near = ((path - adam).norm(dim=1).max() for path in (topk, feedback))
    assert near < 0.5 * astray


def test_the_optimizer_walks_down_the_valley() -> None:
    """The class itself, which selects one of the two gradients and keeps the other in a code."""
    point = torch.nn.Parameter(torch.tensor(START, dtype=torch.float64))
    options = {"density": 0.5, "block": 64, "bucket": 8, "bias_correction": "window"}
    optimizer = MicroAdam([point], lr=LR, window=100, **options)
    for _ in range(500):
        point.grad = _gradient(point.detach())
        optimizer.step()
    x, y = point.tolist()
    # On the floor, and most of the way along it: from 3.8 over 0.56 at the origin.
    assert abs(y - x * x) < 0.01
    assert (1 - x) ** 2 + 100 * (y - x * x) ** 2 < 0.05
