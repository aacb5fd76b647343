"""Issues the launches of Adapprox's fast mode: twelve for all matrices of a round, two for all vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl

from optplan.optim_impls.adapprox import factor_kernels as between
from optplan.optim_impls.adapprox.kernels import sketch_kernel, update_kernel
from optplan.optim_impls.adapprox.layout import SHARES, Table, TableImage, matrix_table, vector_table
from optplan.optim_impls.adapprox.reference import Rates
from optplan.optim_impls.adapprox.subspace import FIRST_SHIFT, SECOND_SHIFT
from optplan.optim_impls.adapprox.vector_kernels import vector_moment_kernel, vector_update_kernel
from optplan.optim_impls.optimizer_base import Batch, GradScale, Member
from optplan.planner.optimizers.adapprox_layout import TILE, VECTOR_CHUNK_NUMEL, MatrixLayout, waves

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
PASS_A = {"num_warps": 4, "num_stages": 1}
PASS_B = {"num_warps": 4, "num_stages": 3}
_SUMS_AT_ONCE = 1024


class Numbers(NamedTuple):
    """The numbers of an update as kernels take them; rate and scale may lie on the device."""

    rates: Rates
    lr: float | torch.Tensor
    grad_scale: GradScale

    @property
    def moments(self) -> tuple[float, float, float, float, float]:
        """beta1, 1 - beta1, beta2, 1 - beta2, eps; the differences taken in double precision."""
        r = self.rates
        return r.beta1, 1 - r.beta1, r.beta2, 1 - r.beta2, r.eps


class Wave(NamedTuple):
    """The matrices of one round of launches."""

    image: TableImage
    layouts: list[MatrixLayout]
    even: bool


def step_matrices(batch: Batch, layout_of: Callable[[Member], MatrixLayout], *, seed: int, numbers: Numbers) -> None:
    """Update matrices with factors, round by round."""
    if "waves" not in batch.scratch:
        layouts = [layout_of(member) for member in batch.members]
        batch.scratch["waves"] = [
            _wave([batch.members[i] for i in places], [layouts[i] for i in places], seed=seed, aligned=batch.aligned)
            for places in waves(layouts)
        ]
    for wave in batch.scratch["waves"]:
        _step_wave(wave, batch.members[0], numbers)


def _wave(members: Sequence[Member], layouts: list[MatrixLayout], *, seed: int, aligned: bool) -> Wave:
    return Wave(matrix_table(members, layouts, seed=seed), layouts, aligned and layouts[0].even)


def _step_wave(wave: Wave, like: Member, numbers: Numbers) -> None:
    device = like.parameter.device
    table = wave.image.upload(device)
    scratch = torch.empty(table.num_scratch, dtype=torch.float32, device=device)
    rank, wide = wave.layouts[0].rank, wave.layouts[0].padded_rank
    shares, sizes = (len(wave.layouts), SHARES), {"RANK": rank, "R": wide}
    between.peaks_kernel[shares](table.rows, scratch, **sizes)
    between.revive_kernel[shares](table.rows, scratch, **sizes)
    _pass_a(table, scratch, like, numbers, even=wave.even, **sizes)
    between.gather_kernel[shares](table.rows, scratch, R=wide)
    _orthonormalize(table, scratch, numbers.rates.clip, wide=wide)
    _pass_b(table, scratch, like, numbers, even=wave.even, **sizes)
    between.store_factors_kernel[shares](table.rows, scratch, **sizes)


def _pass_a(table: Table, scratch: torch.Tensor, like: Member, numbers: Numbers, *, even: bool, **sizes: int) -> None:
    scale, kind = _kind(numbers.grad_scale)
    owners = table.owners[0]
    sketch_kernel[(owners.numel(),)](
        table.rows, owners, scratch, scale, *numbers.moments[2:],
        GRAD=DTYPES[like.gradient.dtype], SCALED=kind, BM=TILE, BN=TILE, EVEN=even, **PASS_A, **sizes,
    )  # fmt: skip


def _orthonormalize(table: Table, scratch: torch.Tensor, clip: float, *, wide: int) -> None:
    tensors = table.rows.shape[0]
    for first in (True, False):
        shift = FIRST_SHIFT if first else SECOND_SHIFT
        between.gram_kernel[(tensors, SHARES)](table.rows, scratch, R=wide, FIRST=first)
        between.factor_kernel[(tensors,)](table.rows, scratch, clip, shift, R=wide, FIRST=first, MANY=_SUMS_AT_ONCE)
        between.apply_kernel[(tensors, SHARES)](table.rows, scratch, R=wide, LAST=not first)


def _pass_b(table: Table, scratch: torch.Tensor, like: Member, numbers: Numbers, *, even: bool, **sizes: int) -> None:
    (scale, scaled), (lr, rated) = _kind(numbers.grad_scale), _kind(numbers.lr)
    owners = table.owners[1]
    update_kernel[(owners.numel(),)](
        table.rows, owners, scratch, scale, lr, numbers.rates.weight_decay, *numbers.moments, **_dtypes(like),
        SCALED=scaled, LR=rated, BM=TILE, BN=TILE, EVEN=even, **PASS_B, **sizes,
    )  # fmt: skip


def step_vectors(batch: Batch, *, numbers: Numbers) -> None:
    """Update tensors whose second moment is whole."""
    like, rates = batch.members[0], numbers.rates
    if "vectors" not in batch.scratch:
        batch.scratch["vectors"] = vector_table(batch.members)
    table = batch.scratch["vectors"].upload(like.parameter.device)
    scratch = torch.empty(table.num_scratch, dtype=torch.float32, device=like.parameter.device)
    (scale, scaled), (lr, rated) = _kind(numbers.grad_scale), _kind(numbers.lr)
    (owners,), grid = table.owners, (table.owners[0].numel(),)
    vector_moment_kernel[grid](
        table.rows, owners, scratch, scale, *numbers.moments[2:],
        GRAD=DTYPES[like.gradient.dtype], SCALED=scaled, CHUNK=VECTOR_CHUNK_NUMEL,
    )  # fmt: skip
    vector_update_kernel[grid](
        table.rows, owners, scratch, scale, lr, rates.weight_decay, rates.clip, *numbers.moments[:2], rates.eps,
        **_dtypes(like), SCALED=scaled, LR=rated, MANY=_SUMS_AT_ONCE, CHUNK=VECTOR_CHUNK_NUMEL,
    )  # fmt: skip


def _dtypes(like: Member) -> dict[str, Any]:
    moment = like.state.get("exp_avg")
    return {
        "WEIGHT": DTYPES[like.parameter.dtype],
        "GRAD": DTYPES[like.gradient.dtype],
        "MOMENT": None if moment is None else DTYPES[moment.dtype],
    }


def _kind(x: GradScale) -> tuple[float | torch.Tensor, int]:
    """A number as a kernel argument, and how the kernel gets it: not at all, by value, from memory."""
    if x is None:
        return 1.0, 0
    return (x, 2) if isinstance(x, torch.Tensor) else (float(x), 1)
