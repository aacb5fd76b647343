"""The launches of Adam-mini's kernels: their configuration, and the numbers of a step computed in double."""

from __future__ import annotations

from collections.abc import Callable
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
from optplan.optim_impls.adam_mini.segment_kernels import (
    segment_moments_kernel,
    segment_sums_kernel,
    segment_update_kernel,
)
from optplan.optim_impls.launch import BoundKernel
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
    """What a step's kernels take beside the table, in their order.

    Attributes:
        device_values: fp32 [tensors, 5], where the step counts, the learning rate or the scale are on the device.
        decay: 1 - lr weight_decay.
        step_size: lr / (1 - beta1^t).
        inverse_root: 1 / sqrt(1 - beta2^t).
        scale: Factor on the gradient.
        seed: Of stochastic rounding.
        step: Number of the step, from 1.
    """

    device_values: torch.Tensor
    decay: float
    step_size: float
    inverse_root: float
    scale: float
    seed: int
    step: int


class _Call(NamedTuple):
    """What every kernel of a batch is given.

    Attributes:
        table: The launch table.
        partials: fp32 partial sums.
        numbers: Of the step.
        weights: 1 - beta1, beta2, 1 - beta2, eps.
        shared_sums: Where the sums over this rank's part of shared blocks go.
        on_device: Whether the step's numbers are read from `device_values`.
        stochastic: Whether bf16 parameters are rounded stochastically.
        plan: Of the batch.
    """

    table: torch.Tensor
    partials: torch.Tensor
    numbers: StepNumbers
    weights: tuple[float, float, float, float]
    shared_sums: torch.Tensor
    on_device: bool
    stochastic: bool
    plan: Plan

    def bound(self, launch: Launch, kernel: Any, constants: Callable[[Launch], dict[str, Any]]) -> BoundKernel:
        """The kernel of a launch, with its constants from the second time on."""
        key = (launch.pieces_at, kernel.fn.__name__, self.on_device, self.stochastic, self.shared_sums is self.table)
        found = self.plan.bound.get(key)
        if found is None:
            p, g, m = (TRITON_DTYPES[dtype] for dtype in self.plan.dtypes)
            known = {"P": p, "G": g, "M": m, "ON_DEVICE": self.on_device, "STOCHASTIC": self.stochastic}
            known |= {"ALIGNED": launch.key.aligned, "SHARED": launch.key.shared}
            taken = {name: value for name, value in known.items() if name in kernel.arg_names}
            programs = launch.num_sums if "SHARED" in taken else launch.num_chunks
            options = constants(launch)
            programs *= options.get("TILES", 1)
            found = self.plan.bound[key] = BoundKernel(kernel, programs, **taken, **options)
        return found


def launch_adam_mini(plan: Plan, group: dict[str, Any], *, step: int, grad_scale: GradScale) -> None:
    """Update all members of a batch; the second moments of shared blocks are already those of this step.

    Args:
        plan: Made for these members.
        group: The param group.
        step: Number of this step, from 1; with `capturable` the states know it.
        grad_scale: None, a number, or an fp32 scalar on the device.
    """
    call = _call(plan, group, step, grad_scale, None)
    for launch in plan.launches:
        if not launch.key.shared:
            _FIRST.get(launch.key.kind, _nothing)(call, launch)
        _LAST[launch.key.kind](call, launch)


def launch_shared_sums(plan: Plan, group: dict[str, Any], *, grad_scale: GradScale, sums: torch.Tensor) -> None:
    """Sum the squares of this rank's part of shared blocks.

    Args:
        plan: Made for the members of a batch.
        group: The param group.
        grad_scale: None, a number, or an fp32 scalar on the device.
        sums: fp32, written where the plan says.
    """
    launches = [launch for launch in plan.launches if launch.key.shared]
    if launches:
        call = _call(plan, group, 1, grad_scale, sums)
        for launch in launches:
            _FIRST[launch.key.kind](call, launch)


def _call(plan: Plan, group: dict[str, Any], step: int, grad_scale: GradScale, sums: torch.Tensor | None) -> _Call:
    table = plan.upload()
    partials = torch.empty(plan.num_partials, dtype=torch.float32, device=plan.device) if plan.num_partials else table
    on_device = group["capturable"] or isinstance(grad_scale, torch.Tensor)
    beta1, beta2 = group["betas"]
    weights = (float(1 - beta1), float(beta2), float(1 - beta2), float(group["eps"]))
    numbers = _numbers(plan, group, step, grad_scale, table)
    shared_sums, stochastic = table if sums is None else sums, group["rounding"] == "stochastic"
    return _Call(table, partials, numbers, weights, shared_sums, on_device, stochastic, plan)


def _numbers(plan: Plan, group: dict[str, Any], step: int, grad_scale: GradScale, unused: torch.Tensor) -> StepNumbers:
    """The step's numbers as arguments, or on the device where the host cannot know one of them without waiting."""
    seed = group["seed"] & 0x7FFFFFFF
    if not group["capturable"] and not isinstance(grad_scale, torch.Tensor):
        scale = 1.0 if grad_scale is None else grad_scale
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        decay = 1.0 - lr * group["weight_decay"]
        return StepNumbers(unused, decay, lr / (1 - beta1**step), float((1 - beta2**step) ** -0.5), scale, seed, step)
    return StepNumbers(_device_values(plan, group, step, grad_scale), 1.0, 0.0, 1.0, 1.0, seed, 0)


def _device_values(plan: Plan, group: dict[str, Any], step: int, grad_scale: GradScale) -> torch.Tensor:
    """fp32 [tensors, 5], computed in fp64: near 1, fp32 loses the digits of 1 - beta2^t."""
    if group["capturable"]:
        steps = torch.stack([state["step"] for state in plan.states]).double()
    else:
        steps = torch.full((len(plan.states),), float(step), dtype=torch.float64, device=plan.device)
    lr = group["lr"].to(plan.device).double() if isinstance(group["lr"], torch.Tensor) else group["lr"]
    beta1, beta2 = group["betas"]
    ones = torch.ones_like(steps)
    scale = ones if grad_scale is None else ones * grad_scale
    columns = [ones - lr * group["weight_decay"], lr / (1 - beta1**steps), (1 - beta2**steps).rsqrt(), scale, steps]
    return torch.stack(columns, dim=1).float()


def _nothing(call: _Call, launch: Launch) -> None:
    """Kinds of one pass sum where they update."""


def _rows(call: _Call, launch: Launch) -> None:
    run = call.bound(launch, rows_kernel, _rows_constants)
    run(call.table, launch.pieces_at, launch.chunks_at, *call.numbers, *call.weights)


def _rows_constants(launch: Launch) -> dict[str, Any]:
    numel = launch.key.block_numel
    width = triton.next_power_of_2(numel)
    tile_rows, chunk_rows = max(1, _ROW_TILE_NUMEL // width), max(1, ROW_CHUNK_NUMEL // numel)
    return {
        "NUMEL": numel,
        "WIDTH": width,
        "TILE_ROWS": tile_rows,
        "TILES": -(-chunk_rows // tile_rows),
        "CHUNK_ROWS": chunk_rows,
        "num_warps": min(_MAX_WARPS, max(1, width * tile_rows // _ELEMENTS_PER_WARP)),
    }


def _elements(call: _Call, launch: Launch) -> None:
    run = call.bound(launch, elements_kernel, _element_constants)
    run(call.table, launch.pieces_at, launch.chunks_at, *call.numbers, *call.weights)


def _element_constants(_: Launch) -> dict[str, Any]:
    return {"CHUNK": ELEMENT_CHUNK_NUMEL}


def _segment_moments(call: _Call, launch: Launch) -> None:
    _, beta2, beta2_rest, _ = call.weights
    device_values, *_, scale, _, _ = call.numbers
    call.bound(launch, segment_sums_kernel, _segment_constants)(
        call.table, launch.pieces_at, launch.chunks_at, device_values, call.partials, launch.partials_at, scale
    )
    call.bound(launch, segment_moments_kernel, _sum_constants)(
        call.table, launch.pieces_at, launch.sums_at, call.partials, launch.partials_at, call.shared_sums,
        beta2, beta2_rest,
    )  # fmt: skip


def _segment_update(call: _Call, launch: Launch) -> None:
    beta1_rest, _, _, eps = call.weights
    run = call.bound(launch, segment_update_kernel, _segment_constants)
    run(call.table, launch.pieces_at, launch.chunks_at, *call.numbers, beta1_rest, eps)


def _segment_constants(_: Launch) -> dict[str, Any]:
    return {"CHUNK": ONE_PROGRAM_NUMEL, "TILE": _SEGMENT_TILE, "num_warps": _SEGMENT_WARPS}


def _sum_constants(_: Launch) -> dict[str, Any]:
    return {"LANES": _SUM_LANES, "num_warps": 1}


def _column_moments(call: _Call, launch: Launch) -> None:
    _, beta2, beta2_rest, _ = call.weights
    device_values, *_, scale, _, _ = call.numbers
    call.bound(launch, column_sums_kernel, _column_constants)(
        call.table, launch.pieces_at, launch.chunks_at, device_values, call.partials, scale
    )
    call.bound(launch, column_moments_kernel, _head_constants)(
        call.table, launch.pieces_at, launch.sums_at, call.partials, call.shared_sums, beta2, beta2_rest
    )


def _column_update(call: _Call, launch: Launch) -> None:
    beta1_rest, _, _, eps = call.weights
    run = call.bound(launch, column_update_kernel, _column_constants)
    run(call.table, launch.pieces_at, launch.chunks_at, *call.numbers, beta1_rest, eps)


def _column_constants(_: Launch) -> dict[str, Any]:
    return {"TILE": COLUMN_TILE, "ROWS": _COLUMN_ROWS, "num_warps": _COLUMN_WARPS}


def _head_constants(launch: Launch) -> dict[str, Any]:
    return {"TILE": COLUMN_TILE, "LANES": triton.next_power_of_2(launch.max_head_dim)}


_FIRST = {"segments": _segment_moments, "columns": _column_moments}
"""What must be known of a block before its update."""
_LAST = {"rows": _rows, "elements": _elements, "segments": _segment_update, "columns": _column_update}
assert PIECE_WORDS == 14, "the kernels' columns are those of the table"
