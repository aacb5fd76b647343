"""Launches MicroAdam's two kernels over many tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
import triton
import triton.language as tl

from optplan.optim_impls.launch import BoundKernel, TableImage
from optplan.optim_impls.micro_adam.layout import RUN_NUMEL, Layout, layout_of
from optplan.optim_impls.micro_adam.reference import Hyperparameters
from optplan.optim_impls.micro_adam.scratchpad_kernels import SHARED
from optplan.optim_impls.micro_adam.select_kernels import select_kernel
from optplan.optim_impls.micro_adam.update_kernels import update_kernel
from optplan.optim_impls.optimizer_base import GradScale, interpreted
from optplan.planner.optimizers.launch import CHUNK_NUMEL

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
MAX_BLOCK = 8192
MAX_SELECTED = 127
MAX_DENSITY = 1 / 16  # a short block then never selects more elements than it has groups of eight
MAX_WINDOW = 32
MAX_REGISTERS = 128
"""Of a thread of the selection: nothing is spilled and 16 warps fit a multiprocessor; with 96 it takes 4 % longer."""
MAX_SHARED_BYTES = 48 * 1024
"""Of a program's scratchpad that PTX may declare."""
_WARP = 32


def kernels_take(*, window: int, density: float, block: int, bucket: int) -> bool:
    """Whether the kernels serve this layout: powers of two, and a window that fits into registers."""
    powers = all(size & (size - 1) == 0 for size in (block, bucket))
    few = density <= MAX_DENSITY and density * block <= MAX_SELECTED and window <= MAX_WINDOW
    if not (powers and few and 256 <= block <= MAX_BLOCK):
        return False
    selected = layout_of(block, block=block, bucket=bucket, window=window, density=density).selection
    return 4 * _update_words(block, window * selected.num_selected) <= MAX_SHARED_BYTES


def _has_bulk_prefetch(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _update_words(block: int, num_entries: int) -> int:
    return block // 16 + 3 * int(triton.next_power_of_2(num_entries))


class MicroAdamLaunch:
    """The launches of a step over tensors of the same dtypes, good for as long as none of them moves.

    Args:
        rows: For each tensor: parameter, gradient, error feedback, its minima and maxima, window indices and values,
            and the step counter if `capturable`.
        ordinals: For each tensor its place among the optimizer's parameters.
        layout: Of any of the tensors; what all have in common counts.
        aligned: Whether every tensor begins at 16 bytes.
        capturable: Whether the kernels read the step counters on the device.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[torch.Tensor]],
        ordinals: Sequence[int],
        *,
        layout: Layout,
        aligned: bool,
        capturable: bool,
    ) -> None:
        selected, part = layout.selection.num_selected_block, Fraction(str(layout.density))
        self._image = TableImage(rows, ordinals)
        self._layout = layout
        in_last_chunk = (rows[-1][0].numel() - 1) % CHUNK_NUMEL + 1
        self._num_programs = (self._image.num_chunks - 1) * (CHUNK_NUMEL // layout.block)
        self._num_programs += -(-in_last_chunk // layout.block)
        self._has_tails = any(row[0].numel() % layout.block for row in rows)
        common = {
            "RUNS": layout.block // (RUN_NUMEL * layout.num_lanes),
            "LANES": layout.num_lanes,
            "BUCKETS": layout.block // layout.bucket,
            "WINDOW": layout.window,
            "SELECTED": selected,
            "NUMERATOR": part.numerator,
            "DENOMINATOR": part.denominator,
            "ALIGNED": aligned,
            "CHUNK": CHUNK_NUMEL,
            "CAPTURABLE": capturable,
            "num_warps": 1,
        }
        ranked = max(_WARP, triton.next_power_of_2(selected + selected // 2))
        self._select = common | {
            "CAPACITY": ranked,
            "G_DTYPE": TRITON_DTYPES[rows[0][1].dtype],
            "PAD": SHARED.format(8 * ranked),
        }
        words = _update_words(layout.block, layout.window * selected)
        self._update = common | {
            "WP": triton.next_power_of_2(layout.window),
            "KP": max(_WARP, triton.next_power_of_2(selected)),
            "CAPACITY": triton.next_power_of_2(layout.window * selected),
            "P_DTYPE": TRITON_DTYPES[rows[0][0].dtype],
            "BULK": _has_bulk_prefetch(rows[0][0].device),
            "PAD": SHARED.format(4 * words),
        }
        self._num_words = max(words, 2 * ranked)
        self._kernels: dict[tuple[Any, ...], BoundKernel] = {}

    def __call__(self, *, step: int, hyper: Hyperparameters, seed: int, scale: GradScale) -> None:
        """Do one step.

        Args:
            step: The number of this step, from 1; any if capturable.
            hyper: Hyperparameters.
            seed: Of stochastic rounding; each tensor and step mixes in its own.
            scale: Multiplied onto every gradient: None, a number or a scalar on the device.
        """
        table = self._image.upload()
        places = (table.rows, table.chunk_offset, table.chunk_row, self._scratch(table.rows))
        window = self._layout.window
        slot = (step - 1) % window
        numbers = (1.0 if scale is None else scale, seed & 0x7FFFFFFF, step, slot)
        how: dict[str, Any] = {
            "FACTOR": 0 if scale is None else 1 + isinstance(scale, torch.Tensor),  # on the device it is fp32
            "STOCHASTIC": hyper.rounding == "stochastic",
        }
        self._kernel(select_kernel, self._num_programs, {**how, "TAIL": False})(*places, *numbers)
        if self._has_tails:
            self._kernel(select_kernel, self._image.num_rows, {**how, "TAIL": True})(*places, *numbers)
        how = {
            "DECAY": hyper.weight_decay > 0,
            "DENSE": hyper.alpha > 0,
            "LR_ON_DEVICE": isinstance(hyper.lr, torch.Tensor),
            "FULL": hyper.bias_correction == "full",
        }
        update = self._kernel(update_kernel, self._num_programs, how, getattr(hyper.lr, "dtype", None))
        more = (hyper.eps, hyper.alpha, 1 - hyper.alpha)
        update(*places, slot, min(step, window), *self._numbers(step, hyper), *more)

    def _kernel(
        self, kernel: Any, num_programs: int, how: dict[str, Any], lr: torch.dtype | None = None
    ) -> BoundKernel:
        """A kernel with its constants, for a learning rate on the device if it has a dtype."""
        key = (kernel is update_kernel, lr, *how.values())
        found = self._kernels.get(key)
        if found is None:
            constants = self._update if kernel is update_kernel else self._select
            if not how.get("TAIL", True):
                constants = constants | {"maxnreg": MAX_REGISTERS}
            found = self._kernels[key] = BoundKernel(kernel, num_programs, **constants, **how)
        return found

    def _numbers(self, step: int, hyper: Hyperparameters) -> tuple[Any, ...]:
        """Learning rate, weight decay, what decay leaves, the logarithms of betas, the corrections."""
        logarithms = (math.log2(beta) if beta else -1e4 for beta in hyper.betas)
        if self._update["CAPTURABLE"]:
            return hyper.lr, hyper.weight_decay, 1.0, *logarithms, *(1 - beta for beta in hyper.betas)
        decay = 1 - hyper.lr * hyper.weight_decay
        corrections = hyper.corrections(step=step, window=self._layout.window)
        return hyper.lr, hyper.weight_decay, decay, *logarithms, *corrections

    def _scratch(self, unused: torch.Tensor) -> torch.Tensor:
        """What stands in for shared memory in the interpreter."""
        size = max(self._num_programs, self._image.num_rows) * self._num_words
        return torch.full((size,), -1, dtype=torch.int32) if interpreted() else unused
