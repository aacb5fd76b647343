"""AdamW in plain torch.

Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019, Algorithm 2, in the form torch gives
it: the decay is scaled by the learning rate, eps stands outside the root and after its bias correction.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from optplan.optim_impls.rounding import random_bits, store


class Hyper(NamedTuple):
    """The numbers of one step.

    Attributes:
        lr: Learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the corrected second moment.
        weight_decay: Part of the parameter, times `lr`, that is taken off.
        step: Steps, this one included; from 1.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: float


def adamw_step(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    hyper: Hyper,
    *,
    grad_scale: float | torch.Tensor | None = None,
    seed: int | None = None,
    compensation: torch.Tensor | None = None,
) -> None:
    """Update parameter and moments in place; the arithmetic is in fp32, in fp64 for an fp64 parameter.

    Args:
        parameter: Any shape.
        gradient: Of the parameter's shape, any real dtype.
        exp_avg: First moment, of the parameter's shape.
        exp_avg_sq: Second moment, of the parameter's shape.
        hyper: The numbers of this step.
        grad_scale: Multiplied onto the gradient.
        seed: Of this step and tensor; bf16 parameters and second moments are then rounded stochastically.
        compensation: What rounding took from the parameter so far (Kahan), of its shape and dtype; changed in place.
    """
    lr, beta1, beta2, eps, weight_decay, step = hyper
    work = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    p, g, m, v = (tensor.to(work) for tensor in (parameter, gradient, exp_avg, exp_avg_sq))
    if grad_scale is not None:
        g = g * grad_scale
    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * (g * g)
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    update = (lr / correction1) * m / (v.sqrt() * correction2**-0.5 + eps)
    bits = None if seed is None else random_bits(p, seed)
    exp_avg.copy_(m)
    store(exp_avg_sq, v, None if bits is None else bits >> 16)
    if compensation is None:
        store(parameter, (1 - lr * weight_decay) * p - update, None if bits is None else bits & 0xFFFF)
    else:
        add_with_kahan(parameter, -(lr * weight_decay) * p - update, compensation)


def add_with_kahan(parameter: torch.Tensor, change: torch.Tensor, compensation: torch.Tensor) -> None:
    """Add `change` to `parameter`, carrying what rounding takes off in `compensation`."""
    old = parameter.to(change.dtype, copy=True)
    wanted = change + compensation.to(change.dtype)
    parameter.copy_(old + wanted)
    compensation.copy_(wanted - (parameter.to(change.dtype) - old))
