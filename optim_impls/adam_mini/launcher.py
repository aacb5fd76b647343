"""The launches of Adam-mini's kernels: their configuration, and the numbers of a step computed in double."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from optplan.optim_impls.adam_mini.column_kernels import (
    column_moments_kernel,
    column_sums_kernel,
    column_update_kernel,
)
from optplan.optim_impls.adam_mini.kernels import elements_kernel, rows_kernel
from optplan.optim_impls.adam_mini.plan import Launch, Plan
from optplan.optim_impls.adam_mini.reference import Hyperparameters
from optplan.optim_impls.adam_mini.segment_kernels import (
    segment_moments_kernel,
    segment_sums_kernel,
    segment_update_kernel,
)
from optplan.optim_impls.optimizer_base import GradScale
from optplan.planner.optimizers.adam_mini_work import (
    COLUMN_TILE,
    ELEMENT_CHUNK_NUMEL,
    ONE_PROGRAM_NUMEL,
    PIECE_WORDS,
    ROW_CHUNK_NUMEL,
)

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_ROW_TILE_NUMEL = 4096
_ELEMENTS_PER_WARP = 512
_MAX_WARPS = 8
_SEGMENT_TILE = 2048
_SEGMENT_WARPS = 8
_COLUMN_ROWS = 8
_COLUMN_WARPS = 4
_SUM_LANES = 128


class StepNumbers(NamedTuple):
    """What a step's kernels take beside the table.

    Attributes:
        device_values: fp32 [tensors, 4], where the step counts, the learning rate or the scale are on the device.
        decay: 1 - lr weight_decay.
        step_size: lr / (1 - beta1^t).
        inverse_root: 1 / sqrt(1 - beta2^t).
        scale: Factor on the gradient.
        on_device: Whether the four are read from `device_values`.
    """

    device_values: torch.Tensor
    decay: float
    step_size: float
    inverse_root: float
    scale: float
    on_device: bool


class _Call(NamedTuple):
    """What every kernel of a batch is given."""

    table: torch.Tensor
    partials: torch.Tensor
    numbers: StepNumbers
    hyperparameters: Hyperparameters
    constants: dict[str, Any]


def launch_adam_mini(plan: Plan, group: dict[str, Any], *, step: int, grad_scale: GradScale) -> None:
    """Update all members of a batch.

    Args:
        plan: Made for these members.
        group: The param group.
        step: Number of this step, from 1; with `capturable` the states know it.
        grad_scale: None, a number, or an fp32 scalar on the device.
    """
    beta1, beta2 = group["betas"]
    table = plan.upload()
    partials = torch.empty(plan.num_partials, dtype=torch.float32, device=plan.device)
    numbers = _numbers(plan, group, step, grad_scale, table)
    hyperparameters = Hyperparameters(0.0, beta1, beta2, group["eps"], group["weight_decay"])
    p, g, m = (TRITON_DTYPES[dtype] for dtype in plan.dtypes)
    constants = {"P": p, "G": g, "M": m, "ON_DEVICE": numbers.on_device}
    call = _Call(table, partials, numbers, hyperparameters, constants)
    for launch in plan.launches:
        _LAUNCHERS[launch.key.kind](call, launch)


def _numbers(plan: Plan, group: dict[str, Any], step: int, grad_scale: GradScale, unused: torch.Tensor) -> StepNumbers:
    """The step's numbers as arguments, or on the device where the host cannot know one of them without waiting."""
    if not group["capturable"] and not isinstance(grad_scale, torch.Tensor):
        scale = 1.0 if grad_scale is None else grad_scale
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        decay = 1 - lr * group["weight_decay"]
        return StepNumbers(unused, decay, lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, scale, False)
    return StepNumbers(_device_values(plan, group, step, grad_scale), 1.0, 0.0, 1.0, 1.0, True)


def _device_values(plan: Plan, group: dict[str, Any], step: int, grad_scale: GradScale) -> torch.Tensor:
    """fp32 [tensors, 4], computed in fp64: near 1, fp32 loses the digits of 1 - beta2^t."""
    if group["capturable"]:
        steps = torch.stack([state["step"] for state in plan.states]).double()
    else:
        steps = torch.full((len(plan.states),), float(step), dtype=torch.float64, device=plan.device)
    lr = group["lr"].to(plan.device).double() if isinstance(group["lr"], torch.Tensor) else group["lr"]
    beta1, beta2 = group["betas"]
    ones = torch.ones_like(steps)
    scale = ones if grad_scale is None else ones * grad_scale
    columns = [ones - lr * group["weight_decay"], lr / (1 - beta1**steps), (1 - beta2**steps).rsqrt(), scale]
    return torch.stack(columns, dim=1).float()


def _rows(call: _Call, launch: Launch) -> None:
    numel = launch.key.block_numel
    width = triton.next_power_of_2(numel)
    tile_rows = max(1, _ROW_TILE_NUMEL // width)
    tiles = -(-max(1, ROW_CHUNK_NUMEL // numel) // tile_rows)
    h = call.hyperparameters
    rows_kernel[(launch.num_chunks * tiles,)](
        *_table(call, launch), *call.numbers[:5], 1 - h.beta1, h.beta2, 1 - h.beta2, h.eps, **call.constants,
        ALIGNED=launch.key.aligned, NUMEL=numel, WIDTH=width, TILE_ROWS=tile_rows, TILES=tiles,
        num_warps=min(_MAX_WARPS, max(1, width * tile_rows // _ELEMENTS_PER_WARP)),
    )  # fmt: skip


def _elements(call: _Call, launch: Launch) -> None:
    h = call.hyperparameters
    elements_kernel[(launch.num_chunks,)](
        *_table(call, launch), *call.numbers[:5], 1 - h.beta1, h.beta2, 1 - h.beta2, h.eps, **call.constants,
        CHUNK=ELEMENT_CHUNK_NUMEL,
    )  # fmt: skip


def _segments(call: _Call, launch: Launch) -> None:
    pieces, chunks = _table(call, launch)
    h, n = call.hyperparameters, call.numbers
    partials = call.partials[launch.partials_at :]
    constants = {**call.constants, "ALIGNED": launch.key.aligned, "CHUNK": ONE_PROGRAM_NUMEL, "TILE": _SEGMENT_TILE}
    segment_sums_kernel[(launch.num_chunks,)](
        pieces, chunks, n.device_values, partials, n.scale, **constants, num_warps=_SEGMENT_WARPS
    )
    segment_moments_kernel[(launch.num_sums,)](
        pieces, call.table[launch.sums_at :], partials, h.beta2, 1 - h.beta2, LANES=_SUM_LANES, num_warps=1
    )
    segment_update_kernel[(launch.num_chunks,)](
        pieces, chunks, *n[:5], 1 - h.beta1, h.eps, **constants, num_warps=_SEGMENT_WARPS
    )


def _columns(call: _Call, launch: Launch) -> None:
    pieces, chunks = _table(call, launch)
    h, n = call.hyperparameters, call.numbers
    constants = {**call.constants, "ALIGNED": launch.key.aligned, "TILE": COLUMN_TILE, "ROWS": _COLUMN_ROWS}
    column_sums_kernel[(launch.num_chunks,)](
        pieces, chunks, n.device_values, call.partials, n.scale, **constants, num_warps=_COLUMN_WARPS
    )
    lanes = triton.next_power_of_2(launch.max_head_dim)
    column_moments_kernel[(launch.num_sums,)](
        pieces, call.table[launch.sums_at :], call.partials, h.beta2, 1 - h.beta2, TILE=COLUMN_TILE, LANES=lanes
    )
    column_update_kernel[(launch.num_chunks,)](
        pieces, chunks, *n[:5], 1 - h.beta1, h.eps, **constants, num_warps=_COLUMN_WARPS
    )


def _table(call: _Call, launch: Launch) -> tuple[torch.Tensor, torch.Tensor]:
    return call.table[launch.pieces_at :], call.table[launch.chunks_at :]


_LAUNCHERS = {"rows": _rows, "elements": _elements, "segments": _segments, "columns": _columns}
assert PIECE_WORDS == 11, "the kernels' columns are those of the table"
