"""Adam-mini in plain torch, to be read beside the paper.

Zhang et al., ICLR 2025, arXiv 2406.16793, Algorithm 1. With one second moment `v_b` for each block `b` of elements, and
everything else as in AdamW (Loshchilov and Hutter), at step `t`:

    w   <- w - lr weight_decay w                        decoupled weight decay
    m   <- beta1 m + (1 - beta1) g
    v_b <- beta2 v_b + (1 - beta2) mean of g^2 over b
    w   <- w - lr m_hat / (sqrt(v_hat_b) + epsilon)     m_hat = m / (1 - beta1^t),  v_hat = v / (1 - beta2^t)

Arithmetic is in fp32, or fp64 for fp64 tensors, whatever the dtypes that the parameter, the gradient and the first
moment are stored in; the second moment is always stored in the dtype of the arithmetic.
"""

from __future__ import annotations

import math

import msgspec
import torch
from torch import Tensor

from optplan.planner.optimizers.adam_mini_blocks import Blocks


class Hyperparameters(msgspec.Struct, frozen=True):
    """What a param group says about the step.

    Attributes:
        lr: Learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moments.
        eps: Added to the root of the second moment after its bias correction.
        weight_decay: Decoupled, in units of the learning rate.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def block_mean_square(gradient: Tensor, blocks: Blocks) -> Tensor:
    """Mean of the squared gradient over each block, `[num_blocks]` (like the gradient for `element`)."""
    squares = gradient.square()
    if blocks.kind == "element":
        return squares
    sums = _neurons_first(squares, blocks).sum(dim=1).view(-1, blocks.neurons_per_period)
    grouped, single = sums.tensor_split([blocks.num_grouped * blocks.head_dim], dim=1)
    heads = grouped.reshape(len(sums), blocks.num_grouped, blocks.head_dim).sum(dim=2) / blocks.head_dim
    return torch.cat([heads, single], dim=1).flatten() / blocks.fan_in


def spread(values: Tensor, blocks: Blocks) -> Tensor:
    """The value of each element's block, in a shape that broadcasts against the tensor.

    Args:
        values: One value a block, `[num_blocks]`.
        blocks: The blocks of the tensor.
    """
    if blocks.kind == "element":
        return values
    if blocks.kind == "tensor":
        return values.view((1,) * len(blocks.shape))
    by_period = values.view(-1, blocks.blocks_per_period)
    heads, single = by_period.tensor_split([blocks.num_grouped], dim=1)
    neurons = torch.cat([heads.repeat_interleave(blocks.head_dim, dim=1), single], dim=1)
    sizes = [size if axis in blocks.output_axes else 1 for axis, size in enumerate(blocks.shape)]
    return neurons.reshape(sizes)


def adam_mini(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    blocks: Blocks,
    step: int,
    hyperparameters: Hyperparameters,
) -> Tensor:
    """One step; the moments are updated in place, the new parameter is returned in the dtype of the arithmetic.

    Args:
        parameter: The parameter; it is not written, so that the caller chooses how to round.
        gradient: Its gradient, of the same shape.
        exp_avg: First moment, like the parameter.
        exp_avg_sq: Second moments, of `blocks.state_shape`, fp32 (fp64 for fp64 parameters).
        blocks: Blocks of the parameter.
        step: Number of this step, from 1.
        hyperparameters: Of the param group.
    """
    h, dtype = hyperparameters, exp_avg_sq.dtype
    g = gradient.to(dtype)
    m = torch.lerp(exp_avg.to(dtype), g, 1 - h.beta1)
    exp_avg.copy_(m)
    exp_avg_sq.mul_(h.beta2).add_(block_mean_square(g, blocks), alpha=1 - h.beta2)
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - h.beta2**step)).add_(h.eps)
    update = m.div_(spread(denominator, blocks)).mul_(h.lr / (1 - h.beta1**step))
    return parameter.to(dtype) * (1 - h.lr * h.weight_decay) - update


def _neurons_first(tensor: Tensor, blocks: Blocks) -> Tensor:
    """The tensor as a matrix `[neurons, fan_in]`."""
    front = tensor.movedim(blocks.output_axes, tuple(range(len(blocks.output_axes))))
    return front.reshape(blocks.num_neurons, blocks.fan_in)
