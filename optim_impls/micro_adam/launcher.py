"""Launches MicroAdam's two kernels over many tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
import triton
import triton.language as tl

from optplan.optim_impls.launch import TableImage
from optplan.optim_impls.micro_adam.layout import RUN_NUMEL, Layout
from optplan.optim_impls.micro_adam.reference import Hyperparameters
from optplan.optim_impls.micro_adam.select_kernels import select_kernel
from optplan.optim_impls.micro_adam.update_kernels import update_kernel
from optplan.optim_impls.optimizer_base import GradScale, interpreted
from optplan.planner.optimizers.launch import CHUNK_NUMEL

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
MAX_BLOCK = 4096  # two floats an element fill the 48 KB of shared memory that PTX may declare up to 6144
MAX_SELECTED = 127  # eight times as many fit into ten bits
MAX_DENSITY = 1 / 16  # a short block then never selects more elements than it has runs
MAX_WINDOW = 32
MAX_REGISTERS = 128
"""Of a thread in the selection: a few spills, but 16 warps a multiprocessor instead of 12; 5 % faster on an H200."""
_WARP = 32
_SHARED = "{{ .shared .align 16 .b8 sums[{}]; mov.u32 $0, sums; }}"


def kernels_take(*, window: int, density: float, block: int, bucket: int) -> bool:
    """Whether the kernels serve this layout: powers of two, and a window that fits into registers."""
    powers = all(size & (size - 1) == 0 for size in (block, bucket))
    few = density <= MAX_DENSITY and density * block <= MAX_SELECTED and window <= MAX_WINDOW
    return powers and few and 256 <= block <= MAX_BLOCK


class MicroAdamLaunch:
    """The launches of a step over tensors of the same dtypes, good for as long as none of them moves.

    Args:
        rows: For each tensor: parameter, gradient, error feedback, its minima and maxima, window indices and values.
        ordinals: For each tensor its place among the optimizer's parameters.
        layout: Of any of the tensors; what all have in common counts.
        aligned: Whether every tensor begins at 16 bytes.
    """

    def __init__(
        self, rows: Sequence[Sequence[torch.Tensor]], ordinals: Sequence[int], *, layout: Layout, aligned: bool
    ) -> None:
        selected, part = layout.selection.num_selected_block, Fraction(str(layout.density))
        self._image = TableImage(rows, ordinals)
        self._layout = layout
        self._num_programs = self._image.num_chunks * (CHUNK_NUMEL // layout.block)
        self._has_tails = any(row[0].numel() % layout.block for row in rows)
        common = {
            "WINDOW": layout.window,
            "SELECTED": selected,
            "KP": max(_WARP, triton.next_power_of_2(selected)),
            "NUMERATOR": part.numerator,
            "DENOMINATOR": part.denominator,
            "ALIGNED": aligned,
            "CHUNK": CHUNK_NUMEL,
            "num_warps": 1,
        }
        self._select = common | {
            "RUNS": layout.bucket // RUN_NUMEL,
            "BUCKETS": layout.block // layout.bucket,
            "G_DTYPE": TRITON_DTYPES[rows[0][1].dtype],
        }
        self._update = common | {
            "SIZE": layout.block,
            "WP": triton.next_power_of_2(layout.window),
            "P_DTYPE": TRITON_DTYPES[rows[0][0].dtype],
            "SHARED": _SHARED.format(8 * layout.block),
        }

    def __call__(self, *, step: int, hyper: Hyperparameters, seed: int, scale: GradScale) -> None:
        """Do one step.

        Args:
            step: The number of this step, from 1.
            hyper: Hyperparameters.
            seed: Of stochastic rounding; each tensor and step mixes in its own.
            scale: Multiplied onto every gradient: None, a number or a scalar on the device.
        """
        table = self._image.upload()
        places = (table.rows, table.chunk_offset, table.chunk_row)
        window = self._layout.window
        slot = (step - 1) % window
        numbers = (1.0 if scale is None else scale, seed & 0x7FFFFFFF, step, slot)
        how = self._select | {
            "FACTOR": 0 if scale is None else 1 + isinstance(scale, torch.Tensor),
            "STOCHASTIC": hyper.rounding == "stochastic",
        }
        select_kernel[(self._num_programs,)](*places, *numbers, TAIL=False, maxnreg=MAX_REGISTERS, **how)
        if self._has_tails:
            select_kernel[(self._image.num_rows,)](*places, *numbers, TAIL=True, **how)
        update_kernel[(self._num_programs,)](
            *places,
            self._scratch(table.rows),
            slot,
            min(step, window),
            hyper.lr,
            1 - hyper.lr * hyper.weight_decay,
            *(math.log2(beta) if beta else -1e4 for beta in hyper.betas),
            *hyper.corrections(step=step, window=window),
            hyper.eps,
            DECAY=hyper.weight_decay > 0,
            **self._update,
        )

    def _scratch(self, unused: torch.Tensor) -> torch.Tensor:
        """What stands in for shared memory in the interpreter."""
        size = self._num_programs * 2 * self._layout.block
        return torch.full((size,), torch.nan) if interpreted() else unused
