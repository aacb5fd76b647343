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
    return _sum_of_blocks(_sum_of_neurons(squares, blocks), blocks) / block_numels(blocks, like=squares)


def block_square_sums(gradient: Tensor, blocks: Blocks, *, rows: slice) -> Tensor:
    """Sum of the squares of some rows of a gradient over each block of the whole tensor, `[num_blocks]`.

    Args:
        gradient: The rows.
        blocks: Blocks of the whole tensor.
        rows: Which rows of it they are.
    """
    sums = _sum_of_neurons(gradient.square(), blocks)
    if 0 in blocks.output_axes:
        of_row = blocks.num_neurons // blocks.shape[0]
        own = sums
        sums = own.new_zeros(blocks.num_neurons)
        sums[rows.start * of_row : rows.stop * of_row] = own
    return _sum_of_blocks(sums, blocks)


def block_numels(blocks: Blocks, *, like: Tensor) -> Tensor:
    """Elements of each block, `[num_blocks]`."""
    period = [blocks.head_dim] * blocks.num_grouped + [1] * (blocks.num_single * blocks.head_dim)
    return like.new_tensor(period).mul_(blocks.fan_in).repeat(blocks.num_periods)


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
    rows: slice | None = None,
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
        rows: Which rows of the tensor parameter, gradient and first moment are; `blocks` and `exp_avg_sq` are of all,
            and `exp_avg_sq` is already that of this step. None for a whole tensor.
    """
    h, dtype = hyperparameters, exp_avg_sq.dtype
    g = gradient.to(dtype)
    m = torch.lerp(exp_avg.to(dtype), g, 1 - h.beta1)
    exp_avg.copy_(m)
    if rows is None:
        exp_avg_sq.mul_(h.beta2).add_(block_mean_square(g, blocks), alpha=1 - h.beta2)
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - h.beta2**step)).add_(h.eps)
    of_elements = spread(denominator, blocks)
    if rows is not None and of_elements.dim() and of_elements.shape[0] > 1:
        of_elements = of_elements[rows]
    update = m.div_(of_elements).mul_(h.lr / (1 - h.beta1**step))
    return parameter.to(dtype) * (1 - h.lr * h.weight_decay) - update


def _sum_of_neurons(tensor: Tensor, blocks: Blocks) -> Tensor:
    """The sum over each neuron, `[neurons]`."""
    inputs = tuple(axis for axis in range(tensor.dim()) if axis not in blocks.output_axes)
    return (tensor.sum(dim=inputs) if inputs else tensor).reshape(-1)


def _sum_of_blocks(sums: Tensor, blocks: Blocks) -> Tensor:
    """The sum over each block, `[num_blocks]`, from those over all neurons."""
    grouped, single = sums.view(-1, blocks.neurons_per_period).tensor_split(
        [blocks.num_grouped * blocks.head_dim], dim=1
    )
    heads = grouped.reshape(len(grouped), blocks.num_grouped, blocks.head_dim).sum(dim=2)
    return torch.cat([heads, single], dim=1).flatten()
