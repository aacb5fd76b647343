"""MicroAdam in plain torch, to be read beside the paper's Algorithm 1.

Where the paper and the authors' code differ, the code decides: rounding to nearest, decoupled weight decay, bias
correction with the full step although the window forgets. Both `rounding="stochastic"` and `bias_correction="window"`
are at hand.

Densification (`alpha`, in the authors' code alone) puts a part of what is left over into the update of every element,
and carries on with the rest. The authors quantize that rest once more. It consists of levels, evenly spaced as before,
so that the codes stay and the range of each bucket shrinks: nothing is rounded but the ends of the ranges.

As in the authors' code, gradient and error feedback meet in bfloat16, in which the window keeps what is selected; the
moments and the update are computed in float32. Parameters in float64 have all of it in float64, to be compared with.

A block whose accumulated gradient is not finite is skipped for that step: its parameters and its error feedback stay as
they are, and its window row is written empty, so that the older rows age.

Source: Modoranu et al., MicroAdam, NeurIPS 2024, arXiv 2405.15593; IST-DASLab/ISTA-DASLab-Optimizers 1.1.15.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from optplan.optim_impls.micro_adam.codes import bucket_indices, coarse, decode, encode, pack, unpack
from optplan.optim_impls.micro_adam.layout import Layout, Part
from optplan.optim_impls.micro_adam.selection import finite_blocks, select_largest
from optplan.optim_impls.rounding import counter_hash

EMPTY = -1
"""Index of an entry of the window that a skipped block left."""


@dataclass(frozen=True)
class Hyperparameters:
    """What a step needs besides tensors.

    Attributes:
        lr: Learning rate: a number, or for capturable kernels a scalar on the device.
        betas: Decay of the first and of the second moment for each step of age.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled: parameters shrink by `lr x weight_decay`.
        bias_correction: `full` divides by `1 - beta^step`, `window` by the weights that the window holds.
        rounding: `nearest` or `stochastic`, of the error feedback.
        alpha: Part of the error feedback that enters the update.
    """

    lr: Any
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    bias_correction: str = "full"
    rounding: str = "nearest"
    alpha: float = 0.0

    def corrections(self, *, step: int, window: int) -> tuple[float, float]:
        """Factors that turn the window's weighted sums into unbiased first and second moments."""
        age = step if self.bias_correction == "full" else min(step, window)
        first, second = self.betas
        return (1 - first) / (1 - first**age), (1 - second) / (1 - second**age)


@torch.no_grad()
def micro_adam_step(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    state: Mapping[str, torch.Tensor],
    *,
    step: int,
    layout: Layout,
    hyper: Hyperparameters,
    seed: int = 0,
    scale: float | torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """One step over one tensor, in place.

    Args:
        parameter: Flat view `[numel]` of the parameter.
        gradient: Flat gradient `[numel]`; never written.
        state: The tensors of `layout`, flat.
        step: The number of this step, from 1.
        layout: Blocks of the tensor.
        hyper: Hyperparameters.
        seed: Of stochastic rounding: an int32 of its own for each tensor and step.
        scale: Multiplied onto the gradient, if given.
        dtype: What is computed in.
    """
    noise_seed = seed if hyper.rounding == "stochastic" else None
    for part in layout.parts():
        blocks = (part.count, part.numel)
        scaled = gradient[part.elements].view(blocks).to(dtype)
        scaled = coarse(scaled if scale is None else scaled * scale)
        accumulated = coarse(scaled + _error(state, part, dtype=dtype))
        finite = finite_blocks(accumulated)
        indices = select_largest(accumulated, part.num_selected)
        _write_window(state, part, accumulated, indices, finite, row=(step - 1) % layout.window)
        residual, short = accumulated.scatter(1, indices, 0), part.numel < layout.block
        _write_error(state, part, residual, finite, seed=noise_seed, with_zero=short)
        first, second = _moments(state, part, step=step, window=layout.window, betas=hyper.betas, dtype=dtype)
        first_correction, second_correction = hyper.corrections(step=step, window=layout.window)
        update = first_correction * first / ((second_correction * second).sqrt() + hyper.eps)
        update = torch.where(first == 0, 0, update)  # of what the window does not hold, also with an eps of zero
        if hyper.alpha:
            update = update + hyper.alpha * _error(state, part, dtype=dtype)
            _shrink_error(state, part, finite, by=1 - hyper.alpha)
        old = parameter[part.elements].view(blocks)
        new = (1 - hyper.lr * hyper.weight_decay) * old.to(dtype) - hyper.lr * update
        old.copy_(torch.where(finite, new.to(old.dtype), old))


def _error(state: Mapping[str, torch.Tensor], part: Part, *, dtype: torch.dtype) -> torch.Tensor:
    """What earlier steps left over, `[blocks, numel]`."""
    codes = unpack(state["error_feedback"][part.codes].view(part.count, -1), part.numel)
    bucket = bucket_indices(part.numel, part.num_buckets, device=codes.device)
    low, high = (state[name][part.buckets].view(part.count, -1).to(dtype) for name in ("bucket_min", "bucket_max"))
    return decode(codes, low[:, bucket], high[:, bucket])


def _write_window(
    state: Mapping[str, torch.Tensor],
    part: Part,
    accumulated: torch.Tensor,
    indices: torch.Tensor,
    finite: torch.Tensor,
    *,
    row: int,
) -> None:
    """Put the selected into the window's oldest row; skipped blocks leave it empty."""
    shape = (part.count, -1, part.num_selected)
    values = torch.where(finite, accumulated.gather(1, indices), 0)
    state["window_indices"][part.window].view(shape)[:, row] = torch.where(finite, indices, EMPTY).to(torch.int16)
    state["window_values"][part.window].view(shape)[:, row] = values.to(torch.bfloat16)


def _write_error(
    state: Mapping[str, torch.Tensor],
    part: Part,
    residual: torch.Tensor,
    finite: torch.Tensor,
    *,
    seed: int | None,
    with_zero: bool,
) -> None:
    """Quantize what was not selected; skipped blocks keep what they had."""
    bucket = bucket_indices(part.numel, part.num_buckets, device=residual.device)
    noise = None
    if seed is not None:
        positions = torch.arange(part.elements.start, part.elements.stop, device=residual.device)
        noise = (counter_hash(positions, seed) >> 16).to(residual.dtype).view_as(residual) / 2**16
    residual = torch.where(finite, residual, 0)
    codes, low, high = encode(residual, bucket, part.num_buckets, with_zero=with_zero, noise=noise)
    written = (("error_feedback", part.codes, pack(codes)), ("bucket_min", part.buckets, low))
    for name, piece, new in (*written, ("bucket_max", part.buckets, high)):
        old = state[name][piece].view(part.count, -1)
        old.copy_(torch.where(finite, new, old))


def _shrink_error(state: Mapping[str, torch.Tensor], part: Part, finite: torch.Tensor, *, by: float) -> None:
    """Multiply the error feedback, by its ranges; skipped blocks keep what they had."""
    for name in ("bucket_min", "bucket_max"):
        old = state[name][part.buckets].view(part.count, -1)
        old.copy_(torch.where(finite, (by * old.float()).to(old.dtype), old))


def _moments(
    state: Mapping[str, torch.Tensor],
    part: Part,
    *,
    step: int,
    window: int,
    betas: tuple[float, float],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the window `[blocks, numel]` of `beta1^age v` and `beta2^age v^2`, the oldest row first."""
    shape = (part.count, window, part.num_selected)
    indices = state["window_indices"][part.window].view(shape).long().clamp(min=0)  # empty rows have zeros as values
    values = state["window_values"][part.window].view(shape).to(dtype)
    first = values.new_zeros(part.count, part.numel)
    second = torch.zeros_like(first)
    for age in reversed(range(min(step, window))):
        row = (step - 1 - age) % window
        first.scatter_add_(1, indices[:, row], betas[0] ** age * values[:, row])
        second.scatter_add_(1, indices[:, row], betas[1] ** age * values[:, row] ** 2)
    return first, second
