"""The launch of the AdamW kernel: its numbers, computed in double on the host, and its configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl

from optplan.optim_impls.adamw.kernels import KAHAN, NEAREST, STOCHASTIC, adamw_kernel
from optplan.optim_impls.launch import BoundKernel, TableImage
from optplan.optim_impls.optimizer_base import GradScale, interpreted
from optplan.planner.optimizers.launch import CHUNK_NUMEL

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_ROUNDINGS = {"nearest": NEAREST, "stochastic": STOCHASTIC, "kahan": KAHAN}

# The interpreter pays for each program, a GPU for each that is missing.
SPAN = 32768 if interpreted() else 1024
BLOCK = 1024
TAIL = 1024 if interpreted() else 256
NUM_WARPS = 4
_SHAPE = {"CHUNK": CHUNK_NUMEL, "SPAN": SPAN, "BLOCK": BLOCK, "TAIL": TAIL, "num_warps": NUM_WARPS}


class AdamWLaunch:
    """One launch over tensors of the same dtypes, good for as long as none of them moves.

    Args:
        rows: For each tensor: parameter, gradient, first and second moment, the compensation if `kahan`, the step
            counter if `capturable`.
        ordinals: For each tensor its place among the optimizer's parameters.
        kahan: Whether rounding errors are carried.
        capturable: Whether the kernel reads the step counters on the device.
        aligned: Whether every tensor begins at 16 bytes.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[torch.Tensor]],
        ordinals: Sequence[int],
        *,
        kahan: bool,
        capturable: bool,
        aligned: bool,
    ) -> None:
        self.kahan = kahan
        self._capturable = capturable
        self._image = TableImage(rows, ordinals, chunk_numel=CHUNK_NUMEL)
        self._num_programs = self._image.num_chunks * (CHUNK_NUMEL // SPAN)
        self._bound: dict[tuple[Any, ...], BoundKernel] = {}
        kinds = dict(zip(("P", "G", "M", "V"), (TRITON_DTYPES[tensor.dtype] for tensor in rows[0]), strict=False))
        self._constants = kinds | {"CAPTURABLE": capturable, "ALIGNED": aligned, **_SHAPE}

    def __call__(self, group: dict[str, Any], step: int, grad_scale: GradScale) -> None:
        """Update all tensors.

        Args:
            group: The param group's numbers.
            step: Steps, this one included; unused if capturable.
            grad_scale: None, a number or a scalar on the device.
        """
        scale: Any = 1.0 if grad_scale is None else grad_scale
        scale_on_device = isinstance(scale, torch.Tensor)
        lr_on_device = group["lr"].dtype if self._capturable and isinstance(group["lr"], torch.Tensor) else None
        run = self._kernel(group["rounding"], scale_on_device, lr_on_device)
        table = self._image.upload()
        run(
            table.rows,
            table.chunk_offset,
            table.chunk_row,
            scale if scale_on_device else float(scale),
            *_numbers(group, step, capturable=self._capturable),
            group["seed"] & 0x7FFFFFFF,
            step,
        )

    def _kernel(self, rounding: str, scale_on_device: bool, lr_on_device: torch.dtype | None) -> BoundKernel:
        key = (rounding, scale_on_device, lr_on_device)
        if key not in self._bound:
            self._bound[key] = BoundKernel(
                adamw_kernel,
                self._num_programs,
                ROUNDING=_ROUNDINGS[rounding],
                SCALE_ON_DEVICE=scale_on_device,
                LR_ON_DEVICE=lr_on_device is not None,
                **self._constants,
            )
        return self._bound[key]


def _numbers(group: dict[str, Any], step: int, *, capturable: bool) -> tuple[Any, ...]:
    """lr, weight decay, step size, decay, and what else the kernel takes as numbers, in its order."""
    beta1, beta2 = group["betas"]
    lr, weight_decay = group["lr"], float(group["weight_decay"])
    step_size = decay = root_scale = 1.0
    if not isinstance(lr, torch.Tensor) or not capturable:
        lr = float(lr)
    if not capturable:
        step_size = lr / (1 - beta1**step)
        root_scale = (1 - beta2**step) ** -0.5
        decay = -lr * weight_decay if group["rounding"] == "kahan" else 1 - lr * weight_decay
    logarithms = (math.log(beta) if beta else -math.inf for beta in (beta1, beta2))
    numbers = map(float, (1 - beta1, beta2, 1 - beta2, root_scale, group["eps"], *logarithms))
    return (lr, weight_decay, float(step_size), float(decay), *numbers)
