"""The launch of the AdamW kernel: its numbers, computed in double on the host, and its configuration."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton.language as tl

from optplan.optim_impls.adamw.kernels import KAHAN, NEAREST, STOCHASTIC, adamw_kernel
from optplan.optim_impls.launch import TableImage
from optplan.optim_impls.optimizer_base import Batch, GradScale
from optplan.planner.optimizers.launch import CHUNK_NUMEL

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_ROUNDINGS = {"nearest": NEAREST, "stochastic": STOCHASTIC, "kahan": KAHAN}

SPAN = 1024
BLOCK = 1024
TAIL = 256
NUM_WARPS = 4


def launch_adamw(batch: Batch, group: dict[str, Any], grad_scale: GradScale, *, capturable: bool) -> None:
    """Update all members of a batch in one launch.

    Args:
        batch: `scratch["image"]` holds its table.
        group: The param group's numbers.
        grad_scale: None, a number or a scalar on the device.
        capturable: Whether the kernel reads the step counters on the device.
    """
    image: TableImage = batch.scratch["image"]
    parameter, gradient, state, _ = batch.members[0]
    table = image.upload()
    adamw_kernel[(image.num_chunks * (CHUNK_NUMEL // SPAN),)](
        table.rows,
        table.chunk_offset,
        table.chunk_row,
        1.0 if grad_scale is None else grad_scale,
        *_numbers(group, batch.step, capturable=capturable),
        group["seed"] & 0x7FFFFFFF,
        batch.step,
        P=TRITON_DTYPES[parameter.dtype],
        G=TRITON_DTYPES[gradient.dtype],
        M=TRITON_DTYPES[state["exp_avg"].dtype],
        V=TRITON_DTYPES[state["exp_avg_sq"].dtype],
        ROUNDING=_ROUNDINGS[group["rounding"]],
        CAPTURABLE=capturable,
        ALIGNED=batch.aligned,
        SCALE_ON_DEVICE=isinstance(grad_scale, torch.Tensor),
        LR_ON_DEVICE=capturable and isinstance(group["lr"], torch.Tensor),
        CHUNK=CHUNK_NUMEL,
        SPAN=SPAN,
        BLOCK=BLOCK,
        TAIL=TAIL,
        num_warps=NUM_WARPS,
    )


def _numbers(group: dict[str, Any], step: int, *, capturable: bool) -> tuple[Any, ...]:
    """lr, weight decay, step size, decay, and what else the kernel takes as numbers, in its order."""
    beta1, beta2 = group["betas"]
    lr, weight_decay = group["lr"], group["weight_decay"]
    step_size = decay = root_scale = 1.0
    if not capturable:
        lr = float(lr)
        step_size = lr / (1 - beta1**step)
        root_scale = (1 - beta2**step) ** -0.5
        decay = -lr * weight_decay if group["rounding"] == "kahan" else 1 - lr * weight_decay
    logarithms = (math.log(beta) if beta else -math.inf for beta in (beta1, beta2))
    return (
        lr, weight_decay, step_size, decay, 1 - beta1, beta2, 1 - beta2, root_scale, group["eps"], *logarithms,
    )  # fmt: skip
