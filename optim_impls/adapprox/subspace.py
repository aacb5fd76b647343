"""Adapprox's fast mode in plain torch: a warm-started power iteration, chunk of rows by chunk of rows.

The paper draws a new sketch at every step and multiplies by V and Vᵀ five times; the fast mode starts from the last
step's U, which V has hardly left since, and multiplies once. V = beta2 max(Q Uᵀ, 0) + (1 - beta2) G² is rebuilt twice,
a chunk at a time, and never exists as a whole:

    pass A   Y = V X, and the sum that the clip needs         X: U, scaled
    between  Q' = orth(Y)                                     Cholesky-QR, twice
    pass B   the clipped update of W and M, and U' = Vᵀ Q'

A tensor's first steps, in which one gradient is a large part of V, do A and what follows once more from X = Vᵀ Q'.

This is what the Triton kernels compute, and what runs where they do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from optplan.optim_impls.adapprox.reference import Rates, Sketch, low_rank_second_moment
from optplan.optim_impls.rounding import counter_hash
from optplan.planner.optimizers.adapprox_chunks import chunk_rows

FIRST_SHIFT = 1e-5
"""Added to the Gram matrix of the equilibrated sketch (unit diagonal), well above the rounding of its fp32 sums."""
SECOND_SHIFT = 1e-6
"""Added to the second Gram matrix, whose eigenvalues are near 1 or negligible."""
STEPS_TWICE = 8
"""Steps of a tensor, from its first, that iterate twice: what they leave out of V is never seen again."""
START_STRIDE = 2**16
"""Distance of two rows in the counter that a new column's numbers are drawn from; more than any rank."""


def uniform_start(seed: int, *, like: Tensor) -> Sketch:
    """Starts between -1 and 1 that depend on the seed, the row and the column alone; those of the kernels.

    They are odd multiples of 1/128, which bf16 holds.
    """

    def draw(columns: int, width: int) -> Tensor:
        index = torch.arange(columns, device=like.device)[:, None] * START_STRIDE
        bits = counter_hash(index + torch.arange(width, device=like.device), seed)
        return ((bits >> 25).to(like.dtype) * 2 + 1).mul_(2.0**-7).sub_(1)

    return draw


def orthonormal(y: Tensor) -> Tensor:
    """Columns `[..., rows, k]` that span what the columns of y span, by shifted Cholesky-QR twice.

    Directions that y does not span come out short instead of arbitrary: Q Qᵀ never exceeds a projector.
    """
    # By the largest magnitude first: squares of small gradients' second moments would vanish in fp32.
    peaks = torch.linalg.vector_norm(y, ord=math.inf, dim=-2, keepdim=True)
    y = y * torch.where(peaks > 0, 1 / peaks, 0)
    y.div_(torch.linalg.vector_norm(y, dim=-2, keepdim=True).clamp_(min=1))
    for shift in (FIRST_SHIFT, SECOND_SHIFT):
        gram = y.mT @ y
        gram.diagonal(dim1=-2, dim2=-1).add_(shift)
        factor = torch.linalg.cholesky_ex(gram, upper=True).L
        y = torch.linalg.solve_triangular(factor, y, upper=True, left=False)
    return y


def revive(q: Tensor, u: Tensor, sketch: Sketch) -> None:
    """Give the columns of U that are zero a new random start, in place; all of them are at the first step.

    The column of Q beside such a column is emptied, so that Q Uᵀ does not change.
    """
    peaks = torch.linalg.vector_norm(u, ord=math.inf, dim=0)
    dead = peaks == 0
    if bool(dead.any()):
        height = torch.where(peaks.max() > 0, peaks.max(), 1)
        u.copy_(torch.where(dead, sketch(*u.shape) * height, u))
        q.masked_fill_(dead, 0)


def iterates_twice(step: int) -> bool:
    """Whether a step, counted from 1, iterates twice: while a single gradient is a large part of V."""
    return step <= STEPS_TWICE


def step_matrix(
    w: Tensor,
    grad: Tensor,
    momentum: Tensor | None,
    q: Tensor,
    u: Tensor,
    rates: Rates,
    sketch: Sketch,
    *,
    twice: bool = False,
) -> None:
    """One step of a matrix in place: weights, first moment and both factors.

    Args:
        w: Weights `[rows, columns]`.
        grad: Their gradient.
        momentum: First moment, or None.
        q: Factor `[rows, k]`.
        u: Factor `[columns, k]`.
        rates: Learning rate and the other numbers; no guidance.
        sketch: Start of a new column.
        twice: Whether to iterate twice.
    """
    revive(q, u, sketch)
    # No sketch may outlive the basis made of it, and no start its sketch: either may be as large as a chunk of V.
    sketched, square_sum = sketch_product(q, u, scale(u.clone()), grad, rates)
    new_q = orthonormal(sketched)
    del sketched
    if twice:
        start = scale(projected(q, u, grad, new_q, rates.beta2))
        del new_q
        sketched, _ = sketch_product(q, u, start, grad, rates)
        del start
        new_q = orthonormal(sketched)
        del sketched
    factor = 1 / (square_sum / max(1, w.numel())).sqrt().div_(rates.clip).clamp_(min=1)
    new_u = torch.zeros_like(u)
    for rows in row_chunks(w):
        v, g = second_moment_rows(q, u, grad, rows, rates.beta2)
        new_u.addmm_(v.mT, new_q[rows])
        step_rows(w[rows], None if momentum is None else momentum[rows], direction(g, v, rates).mul_(factor), rates)
    q.copy_(new_q)
    u.copy_(new_u)


def sketch_product(q: Tensor, u: Tensor, start: Tensor, grad: Tensor, rates: Rates) -> tuple[Tensor, Tensor]:
    """Pass A: Y = V X `[rows, k]` with X the start, and the sum of squares of the direction G / (sqrt(V) + eps)."""
    y, square_sum = torch.empty_like(q), q.new_zeros(())
    for rows in row_chunks(grad):
        v, g = second_moment_rows(q, u, grad, rows, rates.beta2)
        torch.mm(v, start, out=y[rows])
        square_sum += direction(g, v, rates).square_().sum()
    return y, square_sum


def scale(start: Tensor) -> Tensor:
    """Bring a start's largest magnitude to 1, in place."""
    return start.div_(torch.linalg.vector_norm(start, ord=math.inf).clamp_(min=torch.finfo(start.dtype).tiny))


def projected(q: Tensor, u: Tensor, grad: Tensor, basis: Tensor, beta2: float) -> Tensor:
    """Vᵀ Q' `[columns, k]`."""
    product = torch.zeros_like(u)
    for rows in row_chunks(grad):
        product.addmm_(second_moment_rows(q, u, grad, rows, beta2)[0].mT, basis[rows])
    return product


def row_chunks(matrix: Tensor) -> Iterator[slice]:
    """Slices of as many rows as may exist at a time."""
    rows, columns = matrix.shape
    height = chunk_rows(rows, columns)
    return (slice(first, min(first + height, rows)) for first in range(0, rows, height))


def second_moment_rows(q: Tensor, u: Tensor, grad: Tensor, rows: slice, beta2: float) -> tuple[Tensor, Tensor]:
    """These rows of V and of the gradient in the dtype of the factors."""
    g = grad[rows].to(q.dtype)
    return low_rank_second_moment(q[rows], u, g, beta2), g


def direction(grad: Tensor, v: Tensor, rates: Rates) -> Tensor:
    """G / (sqrt(V) + eps), before the clip."""
    return grad / v.sqrt().add_(rates.eps)


def step_rows(w: Tensor, momentum: Tensor | None, move: Tensor, rates: Rates) -> None:
    """Decay some weights and move them along the clipped direction, through the first moment if there is one."""
    if momentum is not None:
        average = momentum.to(move.dtype).mul_(rates.beta1).add_(move, alpha=1 - rates.beta1)
        momentum.copy_(average)
        move = average
    w.copy_(w.to(move.dtype).mul_(1 - rates.lr * rates.weight_decay).sub_(move, alpha=rates.lr))
