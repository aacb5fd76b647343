"""Adapprox as its paper writes it, in plain torch: the randomized subspace iteration, its adaptive rank, the update.

Zhao et al. 2024, arXiv 2403.14958. Symbols are the paper's: A is the second moment `[rows, columns]`, Q `[rows, k]`
has orthonormal columns, U = AᵀQ `[columns, k]`, and Q Uᵀ stands for A between two steps. Everything runs in the dtype
of its inputs (fp32 or fp64). `docs/adapprox.md` lists each line beside the paper's and what the paper leaves open.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from optplan.planner.optimizers.adapprox_paper import ITERATIONS, OVERSAMPLING

Sketch = Callable[[int, int], Tensor]
"""Draws the start of the range finder from (columns of A, columns of the sketch)."""


def growth(error: float) -> int:
    """How many ranks to add at a relative error: 200 / (1 + exp(-10 error + 2.5)) - 9, rounded up, at least 1."""
    return max(1, math.ceil(200.0 / (1.0 + math.exp(-10.0 * error + 2.5)) - 9.0))


@dataclass(frozen=True)
class RankRule:
    """How the rank adapts.

    Attributes:
        first: Rank that each search starts from.
        threshold: Relative error at which a search ends.
        every: Steps from one search to the next; the first is at step 1.
        growth: Ranks to add at a relative error.
    """

    first: int = 1
    threshold: float = 0.01
    every: int = 10
    growth: Callable[[float], int] = growth

    def searches_at(self, step: int) -> bool:
        """Whether the rank is sought anew at this step, counted from 1."""
        return (step - 1) % self.every == 0


def seeded_sketch(seed: int, *, step: int, index: int, like: Tensor) -> Sketch:
    """Gaussian starts that depend on nothing but the seed, the step, the tensor's index and the sketch's size.

    They are drawn on the CPU, in fp32 whatever A is (a normal number in fp64 takes it ten times as long), so that every
    rank and every device draws the same.
    """

    def draw(columns: int, width: int) -> Tensor:
        generator = torch.Generator()
        generator.manual_seed(mixed_seed(seed, step, index, width))
        drawn = torch.randn(columns, width, generator=generator, dtype=torch.float32)
        return drawn.to(device=like.device, dtype=like.dtype)

    return draw


def mixed_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers, each bit of which changes about half of it (splitmix64)."""
    mask, state = 2**64 - 1, 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


def s_rsi(
    a: Tensor, rank: int, sketch: Sketch, *, iterations: int = ITERATIONS, oversampling: int = OVERSAMPLING
) -> tuple[Tensor, Tensor]:
    """Factors Q `[rows, rank]` and U `[columns, rank]` with Q Uᵀ near A: the paper's S-RSI.

    The sketch has rank + oversampling columns (the paper's k + p), but never more than the smaller side of A; the range
    finder multiplies by A and Aᵀ as often as `iterations` says (the paper's l).
    """
    rows, columns = a.shape
    u = sketch(columns, min(rank + oversampling, rows, columns))
    for _ in range(iterations):
        q = torch.linalg.qr(a @ u).Q
        u = a.mT @ q
    return q[:, :rank], u[:, :rank]


def relative_error(a: Tensor, u: Tensor) -> float:
    """||A - Q Uᵀ|| / ||A|| in Frobenius norm, without forming the difference.

    Q is orthonormal and U = AᵀQ, so the squared residual is ||A||² - ||U||². In fp32 it means nothing below 3e-4.
    """
    whole = float(a.double().square().sum())
    return math.sqrt(max(0.0, 1.0 - float(u.double().square().sum()) / whole)) if whole > 0 else 0.0


def as_rsi(a: Tensor, step: int, rank: int, largest: int, sketch: Sketch, rule: RankRule) -> tuple[Tensor, Tensor]:
    """Factors of A at the rank that the paper's AS-RSI chooses.

    Args:
        a: The second moment `[rows, columns]`.
        step: Counted from 1.
        rank: The last step's rank, kept unless this step searches.
        largest: Rank at which a search ends whatever the error.
        sketch: Start of the range finder.
        rule: When to search, and how.
    """
    if not rule.searches_at(step):
        return s_rsi(a, rank, sketch)
    rank = min(rule.first, largest)
    while True:
        q, u = s_rsi(a, rank, sketch)
        error = relative_error(a, u)
        if error <= rule.threshold or rank >= largest:
            return q, u
        rank = min(rank + rule.growth(error), largest)


def low_rank_second_moment(q: Tensor, u: Tensor, grad: Tensor, beta2: float) -> Tensor:
    """V = beta2 max(Q Uᵀ, 0) + (1 - beta2) G²: entries of the product may be negative, those of V may not."""
    return (q @ u.mT).clamp_(min=0).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)


def clipped(direction: Tensor, threshold: float) -> Tensor:
    """The direction over max(1, RMS / threshold)."""
    rms = direction.norm() / math.sqrt(max(1, direction.numel()))
    divisor: Tensor = (rms / threshold).clamp_(min=1)
    return direction / divisor


def guidance(direction: Tensor, momentum: Tensor, *, cap: float, eps: float) -> Tensor:
    """The factor 1 / (1 - cos(direction, momentum) + eps), at most `cap`."""
    norms = direction.norm() * momentum.norm()
    cosine = (direction * momentum).sum() / norms.clamp_(min=torch.finfo(norms.dtype).tiny)
    factor: Tensor = 1 / (1 - cosine + eps)
    return factor.clamp_(max=cap)


@dataclass(frozen=True)
class Rates:
    """The numbers of one update: learning rate, decays, clip threshold and the cap of the cosine guidance."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    guidance_cap: float | None = None


def updated(
    w: Tensor, grad: Tensor, v: Tensor, momentum: Tensor | None, step: int, rates: Rates
) -> tuple[Tensor, Tensor | None]:
    """New weights and new first moment from this step's second moment V.

    The first moment averages the clipped direction, not the gradient; without one (beta1 = 0) the direction is used.
    There is no bias correction: at step 1 the clip brings the direction's RMS to the threshold.
    """
    direction = clipped(grad / (v.sqrt() + rates.eps), rates.clip)
    used = direction
    if momentum is not None:
        used = momentum = rates.beta1 * momentum + (1 - rates.beta1) * direction
    if momentum is not None and rates.guidance_cap is not None and step > 1:
        used = momentum * guidance(direction, momentum, cap=rates.guidance_cap, eps=rates.eps)
    return w - rates.lr * (used + rates.weight_decay * w), momentum
