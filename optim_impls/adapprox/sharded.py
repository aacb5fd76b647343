"""Adapprox's fast mode where ranks hold different rows of a matrix: the factorisation of the whole matrix.

Y = V X and the update of the weights need a rank's own rows alone. What runs down the columns is added up over all
ranks, in one collective a stage for all matrices together:

    peaks    largest magnitudes of Y's columns
    Gram     YᵀY, and the sum that the clip needs
    Gram     the same of the sketch made orthonormal once
    U'       Vᵀ Q'

A step that iterates twice does all of it twice, the first time for the start of the second. Every rank receives the
same bits, so U is the same on all of them, and the step is that of one process up to the order of fp32 sums. A rank
without rows takes part with nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optplan.optim_impls.adapprox.reference import Rates, Sketch
from optplan.optim_impls.adapprox.subspace import (
    FIRST_SHIFT,
    SECOND_SHIFT,
    direction,
    iterates_twice,
    projected,
    revive,
    row_chunks,
    scale,
    second_moment_rows,
    sketch_product,
    step_rows,
    uniform_start,
)
from optplan.optim_impls.fingerprint import local_tensor
from optplan.optim_impls.optimizer_base import Batch, GradScale, Member
from optplan.optim_impls.rounding import mix_seed
from optplan.optim_impls.sharding import shards_of

Together = Callable[[Sequence[Tensor], str], list[Tensor]]
"""Combines tensors of one dtype over the ranks, in one collective: `sum` or `max`."""


class RowBatch(Batch):
    """Members whose rows lie on several ranks: matrices of one rank of factors, or tensors with whole moments."""


class MatrixRows(NamedTuple):
    """This rank's rows of one matrix.

    Attributes:
        w: Weights `[own rows, columns]`.
        grad: Their gradient.
        momentum: First moment, or None.
        q: Factor `[own rows, k]`.
        u: Factor `[columns, k]`, whole.
        sketch: Start of a new column, the same on every rank.
        numel: Elements of the whole matrix.
    """

    w: Tensor
    grad: Tensor
    momentum: Tensor | None
    q: Tensor
    u: Tensor
    sketch: Sketch
    numel: int


class VectorRows(NamedTuple):
    """This rank's part of a tensor whose second moment is kept whole; `numel` is that of the whole tensor."""

    w: Tensor
    grad: Tensor
    momentum: Tensor | None
    v: Tensor
    numel: int


def step_by_rows(batch: RowBatch, rates: Rates, *, seed: int, grad_scale: GradScale) -> None:
    """One step of a batch, in plain torch."""
    shards = [shards_of(part) for part in batch.parts]
    together = over(shards[0].group)
    gradients = [m.gradient if grad_scale is None else m.gradient * grad_scale for m in batch.members]
    paired = list(zip(batch.members, gradients, [one.numel for one in shards], strict=True))
    if "q_factor" in batch.parts[0].state:
        twice = iterates_twice(batch.step or int(batch.parts[0].state["step"]))
        step_matrices_by_rows([_matrix_rows(*pair, seed=seed) for pair in paired], rates, together, twice=twice)
    else:
        step_vectors_by_rows([_vector_rows(*pair) for pair in paired], rates, together)


def _matrix_rows(member: Member, gradient: Tensor, numel: int, *, seed: int) -> MatrixRows:
    state = {name: local_tensor(value) for name, value in member.state.items()}
    q, u, m = state["q_factor"], state["u_factor"], state.get("exp_avg")
    shape = (q.shape[0], u.shape[0])
    sketch = uniform_start(mix_seed(seed, 0, member.ordinal), like=q)
    moment = None if m is None else m.view(shape)
    return MatrixRows(member.parameter.view(shape), gradient.reshape(shape), moment, q, u, sketch, numel)


def _vector_rows(member: Member, gradient: Tensor, numel: int) -> VectorRows:
    state = {name: local_tensor(value) for name, value in member.state.items()}
    return VectorRows(member.parameter, gradient, state.get("exp_avg"), state["exp_avg_sq"], numel)


def over(group: Any) -> Together:
    """Combines over a process group."""
    import torch.distributed as dist

    operations = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}

    def together(tensors: Sequence[Tensor], operation: str) -> list[Tensor]:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat, op=operations[operation], group=group)
        pieces = torch.split(flat, [tensor.numel() for tensor in tensors])
        return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]

    return together


def step_matrices_by_rows(
    matrices: Sequence[MatrixRows], rates: Rates, together: Together, *, twice: bool = False
) -> None:
    """One step of matrices in place, on all ranks at once: weights, first moments and both factors.

    Args:
        matrices: The same matrices on every rank, in the same order.
        rates: Learning rate and the other numbers; no guidance.
        together: Combines over the ranks.
        twice: Whether to iterate twice.
    """
    # No sketch may outlive the bases made of it, not even in a variable of a loop.
    sketches, sums = zip(*[_sketch(one, rates) for one in matrices], strict=True)
    bases, totals = orthonormal_by_rows(sketches, sums, together)
    del sketches
    if twice:
        starts = together([_projected(one, basis, rates) for one, basis in zip(matrices, bases, strict=True)], "sum")
        del bases
        sketches, sums = zip(
            *[_sketch(one, rates, start) for one, start in zip(matrices, starts, strict=True)], strict=True
        )
        del starts
        bases, totals = orthonormal_by_rows(sketches, sums, together)
        del sketches
    partial = [
        _update(one, basis, clip_factor(total, one.numel, rates), rates)
        for one, basis, total in zip(matrices, bases, totals, strict=True)
    ]
    for one, basis, new_u in zip(matrices, bases, together(partial, "sum"), strict=True):
        one.q.copy_(basis)
        one.u.copy_(new_u)


def orthonormal_by_rows(
    sketches: Sequence[Tensor], sums: Sequence[Tensor], together: Together
) -> tuple[list[Tensor], list[Tensor]]:
    """What `subspace.orthonormal` gives for whole sketches, and sums added up over the ranks on the way.

    Args:
        sketches: This rank's rows of each, `[own rows, k]`.
        sums: Scalars to add up.
        together: Combines over the ranks.
    """
    peaks = together([y.abs().amax(dim=0) if len(y) else y.new_zeros(y.shape[1]) for y in sketches], "max")
    ys = [y * torch.where(peak > 0, 1 / peak, 0) for y, peak in zip(sketches, peaks, strict=True)]
    combined = together([*(y.mT @ y for y in ys), *sums], "sum")
    grams, totals = combined[: len(ys)], combined[len(ys) :]
    units = [1 / gram.diagonal().sqrt().clamp_(min=1) for gram in grams]
    ys = [y * unit for y, unit in zip(ys, units, strict=True)]
    grams = [gram * unit[:, None] * unit for gram, unit in zip(grams, units, strict=True)]
    ys = [_divided(y, gram, FIRST_SHIFT) for y, gram in zip(ys, grams, strict=True)]
    grams = together([y.mT @ y for y in ys], "sum")
    return [_divided(y, gram, SECOND_SHIFT) for y, gram in zip(ys, grams, strict=True)], totals


def step_vectors_by_rows(vectors: Sequence[VectorRows], rates: Rates, together: Together) -> None:
    """One step of tensors with whole second moments, in place; the clip's sums are added up over the ranks."""
    moments = [one.v for one in vectors]
    grads = [one.grad.to(one.v.dtype) for one in vectors]
    torch._foreach_mul_(moments, rates.beta2)
    torch._foreach_addcmul_(moments, grads, grads, value=1 - rates.beta2)
    divisors = torch._foreach_sqrt(moments)
    torch._foreach_add_(divisors, rates.eps)
    moves = torch._foreach_div(grads, divisors)
    (totals,) = together([torch.stack(torch._foreach_norm(moves)).square()], "sum")
    means = torch._foreach_div(list(totals.unbind()), [max(1, one.numel) for one in vectors])
    torch._foreach_mul_(moves, list(clip_factor(torch.stack(means), 1, rates).unbind()))
    for one, move in zip(vectors, moves, strict=True):
        step_rows(one.w, one.momentum, move, rates)


def clip_factor(square_sum: Tensor, numel: int, rates: Rates) -> Tensor:
    """What brings a direction of this sum of squares to at most the threshold's RMS."""
    return 1 / (square_sum / max(1, numel)).sqrt().div_(rates.clip).clamp_(min=1)


def _sketch(one: MatrixRows, rates: Rates, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Pass A over this rank's rows, from U unless a start is given."""
    if start is None:
        revive(one.q, one.u, one.sketch)
        start = one.u.clone()
    if not len(one.w):
        return torch.empty_like(one.q), one.q.new_zeros(())
    return sketch_product(one.q, one.u, scale(start), one.grad, rates)


def _projected(one: MatrixRows, basis: Tensor, rates: Rates) -> Tensor:
    """What this rank's rows add to Vᵀ Q'."""
    if not len(one.w):
        return torch.zeros_like(one.u)
    return projected(one.q, one.u, one.grad, basis, rates.beta2)


def _update(one: MatrixRows, basis: Tensor, scale: Tensor, rates: Rates) -> Tensor:
    """Pass B over this rank's rows; returns their part of the new U."""
    new_u = torch.zeros_like(one.u)
    for rows in row_chunks(one.w) if len(one.w) else ():
        v, g = second_moment_rows(one.q, one.u, one.grad, rows, rates.beta2)
        new_u.addmm_(v.mT, basis[rows])
        momentum = None if one.momentum is None else one.momentum[rows]
        step_rows(one.w[rows], momentum, direction(g, v, rates).mul_(scale), rates)
    return new_u


def _divided(y: Tensor, gram: Tensor, shift: float) -> Tensor:
    """Y L⁻ᵀ with L Lᵀ = gram + shift."""
    gram.diagonal().add_(shift)
    factor = torch.linalg.cholesky_ex(gram, upper=True).L
    solved: Tensor = torch.linalg.solve_triangular(factor, y, upper=True, left=False)
    return solved
