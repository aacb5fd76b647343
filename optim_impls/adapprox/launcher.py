"""Issues the launches of Adapprox's fast mode: seven for all matrices of a round, two for all vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton.language as tl

from optplan.optim_impls.adapprox import factor_kernels as between
from optplan.optim_impls.adapprox.kernels import sketch_kernel, update_kernel
from optplan.optim_impls.adapprox.layout import Table, TableImage, matrix_table, vector_table
from optplan.optim_impls.adapprox.reference import Rates
from optplan.optim_impls.adapprox.subspace import FIRST_SHIFT, SECOND_SHIFT
from optplan.optim_impls.adapprox.vector_kernels import vector_moment_kernel, vector_update_kernel
from optplan.optim_impls.launch import BoundKernel
from optplan.optim_impls.optimizer_base import Batch, GradScale, Member
from optplan.planner.optimizers.adapprox_layout import TILE, VECTOR_CHUNK_NUMEL, MatrixLayout, waves

if TYPE_CHECKING:
    from optplan.optim_impls.adapprox.sharded_launcher import RankSums

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_DTYPES_OF_NUMBERS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
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
        return float(r.beta1), float(1 - r.beta1), float(r.beta2), float(1 - r.beta2), float(r.eps)


class Wave:
    """The matrices of one round of launches, with the kernels bound to them."""

    def __init__(self, members: Sequence[Member], layouts: list[MatrixLayout], *, seed: int, aligned: bool) -> None:
        self.image = matrix_table(members, layouts, seed=seed)
        self.num_programs = self.image.counts
        self._like = members[0].state, members[0].parameter.dtype, members[0].gradient.dtype
        self._sizes = {"RANK": layouts[0].rank, "R": layouts[0].padded_rank}
        self._even = aligned and layouts[0].even
        self._kernels: dict[tuple[int, int], Kernels] = {}
        self._second: dict[tuple[int, int], SecondIteration] = {}

    def kernels(self, scaled: int, rated: int) -> Kernels:
        """The launches, for the ways in which scale and rate may come."""
        if (scaled, rated) not in self._kernels:
            self._kernels[scaled, rated] = self._bind(scaled, rated)
        return self._kernels[scaled, rated]

    def _bind(self, scaled: int, rated: int) -> Kernels:
        (a, b, shares), sizes = self.num_programs, self._sizes
        state, weight, gradient = self._like
        moment = None if "exp_avg" not in state else state["exp_avg"].dtype
        tile = self._tile(scaled, again=0)
        dtypes = {"WEIGHT": DTYPES[weight], "MOMENT": None if moment is None else DTYPES[moment]}
        in_b = pass_b_settings(weight, gradient, sizes["R"], momentum=moment is not None)
        small = {"R": sizes["R"], "num_warps": small_warps(sizes["R"])}
        return Kernels(
            BoundKernel(between.start_kernel, shares, **small, RANK=sizes["RANK"]),
            BoundKernel(sketch_kernel, a, **tile, **sizes, **pass_a_settings(gradient, sizes["R"])),
            BoundKernel(between.gram_kernel, shares, **small, AGAIN=0),
            BoundKernel(between.second_gram_kernel, shares, **small, AGAIN=0),
            BoundKernel(between.basis_kernel, shares, **small, RANK=sizes["RANK"], AGAIN=0),
            BoundKernel(update_kernel, b, **tile, **dtypes, LR=rated, **sizes, **in_b),
            BoundKernel(between.store_factors_kernel, shares, **small, RANK=sizes["RANK"]),
        )

    def second(self, scaled: int, again: int) -> SecondIteration:
        """The launches of a second iteration; with `again` of 2 they do nothing in steps that have none."""
        if (scaled, again) not in self._second:
            self._second[scaled, again] = self._bind_second(scaled, again)
        return self._second[scaled, again]

    def _bind_second(self, scaled: int, again: int) -> SecondIteration:
        (a, b, shares), sizes = self.num_programs, self._sizes
        _, weight, gradient = self._like
        wide, tile = sizes["R"], self._tile(scaled, again=again)
        in_b = pass_b_settings(weight, gradient, wide, momentum=False)
        small = {"R": wide, "num_warps": small_warps(wide)}
        told = {"AGAIN": again if again > 1 else 0}
        dtypes = {"WEIGHT": DTYPES[weight], "MOMENT": None, "LR": 1}
        return SecondIteration(
            BoundKernel(update_kernel, b, **tile, **dtypes, **sizes, **in_b),
            BoundKernel(between.again_kernel, shares, **small, RANK=sizes["RANK"], AGAIN=again),
            BoundKernel(sketch_kernel, a, **tile, **sizes, **pass_a_settings(gradient, wide)),
            BoundKernel(between.gram_kernel, shares, **small, **told),
            BoundKernel(between.second_gram_kernel, shares, **small, **told),
            BoundKernel(between.basis_kernel, shares, **small, RANK=sizes["RANK"], **told),
        )

    def _tile(self, scaled: int, *, again: int) -> dict[str, Any]:
        tile = {"BM": TILE, "BN": TILE, "EVEN": self._even, "SCALED": scaled, "GRAD": DTYPES[self._like[2]]}
        return tile | {"AGAIN": again}


class Kernels(NamedTuple):
    """The launches of a round, in order."""

    start: BoundKernel
    sketch: BoundKernel
    gram: BoundKernel
    second_gram: BoundKernel
    basis: BoundKernel
    update: BoundKernel
    store_factors: BoundKernel


class SecondIteration(NamedTuple):
    """The launches between a first basis and the one of a second iteration, in order."""

    project: BoundKernel
    again: BoundKernel
    sketch: BoundKernel
    gram: BoundKernel
    second_gram: BoundKernel
    basis: BoundKernel


def table_images(batch: Batch, layout_of: Callable[[Member], MatrixLayout], *, seed: int) -> list[TableImage]:
    """The launch tables that a batch needs at every step: one for each round of matrices, or one for all vectors."""
    members = batch.members
    if "q_factor" not in members[0].state:
        batch.scratch["vectors"] = vector_table(members)
        return [batch.scratch["vectors"]]
    layouts = [layout_of(member) for member in members]
    batch.scratch["waves"] = [
        Wave([members[i] for i in places], [layouts[i] for i in places], seed=seed, aligned=batch.aligned)
        for places in waves(layouts)
    ]
    return [wave.image for wave in batch.scratch["waves"]]


def step_matrices(batch: Batch, tables: Sequence[Table], *, numbers: Numbers, again: int) -> None:
    """Update matrices with factors, round by round."""
    for wave, table in zip(batch.scratch["waves"], tables, strict=True):
        step_wave(wave, table, batch.device, numbers, again=again)


def step_wave(
    wave: Wave, table: Table, device: torch.device, numbers: Numbers, *, again: int, sums: RankSums | None = None
) -> None:
    """One round of launches; where rows lie on several ranks, with sums over them in between.

    With `again` of 1 the range finder iterates twice, with 2 where the steps counted on the device say so.
    """
    scratch = torch.empty(table.num_scratch, dtype=torch.float32, device=device)
    (scale, scaled), (lr, rated) = _kind(numbers.grad_scale), _kind(numbers.lr)
    run, rates, moments = wave.kernels(scaled, rated), numbers.rates, numbers.moments
    rows, (of_a, of_b, shares), memory = _pointers(table, scratch, last=run.store_factors)
    run.start(rows, shares, memory)
    run.sketch(rows, of_a, memory, scale, *moments[2:])
    run.gram(rows, shares, memory, float(rates.clip), FIRST_SHIFT)
    if sums is not None:
        sums.first_turn(scratch, clip=float(rates.clip))
    run.second_gram(rows, shares, memory, SECOND_SHIFT)
    if sums is not None:
        sums.second_turn(scratch)
    run.basis(rows, shares, memory, moments[2])
    if again:
        _iterate_again(wave.second(scaled, again), table, scratch, numbers, sums=sums)
    run.update(rows, of_b, memory, scale, lr, float(rates.weight_decay), *moments)
    run.store_factors(rows, shares, memory)
    if sums is not None:
        sums.factors()


def _iterate_again(
    run: SecondIteration, table: Table, scratch: torch.Tensor, numbers: Numbers, *, sums: RankSums | None
) -> None:
    """From a first basis to that of a second iteration."""
    (scale, _), rates, moments = _kind(numbers.grad_scale), numbers.rates, numbers.moments
    rows, (of_a, of_b, shares), memory = _pointers(table, scratch, last=run.basis)
    run.project(rows, of_b, memory, scale, 0.0, 0.0, *moments)
    run.again(rows, shares, memory)
    if sums is not None:
        sums.start_again(scratch)
    run.sketch(rows, of_a, memory, scale, *moments[2:])
    run.gram(rows, shares, memory, float(rates.clip), FIRST_SHIFT)
    if sums is not None:
        sums.first_turn(scratch, clip=float(rates.clip))
    run.second_gram(rows, shares, memory, SECOND_SHIFT)
    if sums is not None:
        sums.second_turn(scratch)
    run.basis(rows, shares, memory, moments[2])


def _pointers(table: Table, scratch: torch.Tensor, *, last: BoundKernel) -> tuple[Any, Sequence[Any], Any]:
    """Rows, owners and scratch as kernels take them: by address once the last of them has been launched."""
    if last.takes_addresses:
        return *table.addresses(), scratch.data_ptr()
    return table.rows, table.owners, scratch


def pass_a_settings(gradient: torch.dtype, wide: int) -> dict[str, int]:
    """Parts that factors are multiplied in, and how far loads run ahead of their use."""
    exact = gradient is torch.float32
    return {"num_warps": 4, "PARTS": 3 if exact else 1, "STAGES": 2 if exact or wide > 32 else 3}


def pass_b_settings(weight: torch.dtype, gradient: torch.dtype, wide: int, *, momentum: bool) -> dict[str, int]:
    """The same, measured on an H200: two programs on a multiprocessor with loads two tiles ahead, or four with one."""
    parts = 3 if gradient is torch.float32 else 1
    if parts == 3 or weight is torch.float32 or wide > 32:
        return {"num_warps": 4, "PARTS": parts, "STAGES": 2}
    more = {"STAGES": 3} if momentum else {"STAGES": 2, "maxnreg": 128}
    return {"num_warps": 4, "PARTS": parts, **more}


def small_warps(wide: int) -> int:
    """Warps of the kernels around the passes, enough for their square matrices to stay in registers."""
    return 4 if wide <= 32 else 8


class VectorKernels(NamedTuple):
    """The launches of a round of vectors, in order."""

    moment: BoundKernel
    update: BoundKernel


def step_vectors(batch: Batch, table: Table, *, numbers: Numbers) -> None:
    """Update tensors whose second moment is whole."""
    (scale, scaled), (lr, rated) = _kind(numbers.grad_scale), _kind(numbers.lr)
    kept, rates = batch.scratch, numbers.rates
    scratch = torch.empty(table.num_scratch, dtype=torch.float32, device=batch.device)
    key = f"kernels of vectors {scaled} {rated}"
    if key not in kept:
        kept[key] = _bind_vectors(batch.members[0], kept["vectors"].counts[0], scaled, rated)
    run, (beta1, rest1, beta2, rest2, eps) = kept[key], numbers.moments
    rows, (owners,), memory = _pointers(table, scratch, last=run.update)
    run.moment(rows, owners, memory, scale, beta2, rest2, eps)
    weight_decay, clip = float(rates.weight_decay), float(rates.clip)
    run.update(rows, owners, memory, scale, lr, weight_decay, clip, beta1, rest1, eps)


def _bind_vectors(like: Member, num_programs: int, scaled: int, rated: int) -> VectorKernels:
    moment = like.state.get("exp_avg")
    shared = {"GRAD": DTYPES[like.gradient.dtype], "SCALED": scaled, "CHUNK": VECTOR_CHUNK_NUMEL}
    dtypes = {"WEIGHT": DTYPES[like.parameter.dtype], "MOMENT": None if moment is None else DTYPES[moment.dtype]}
    return VectorKernels(
        BoundKernel(vector_moment_kernel, num_programs, **shared),
        BoundKernel(vector_update_kernel, num_programs, **shared, **dtypes, LR=rated, MANY=_SUMS_AT_ONCE),
    )


def _kind(x: GradScale) -> tuple[float | torch.Tensor, int]:
    """A number as a kernel argument, and how the kernel gets it: not at all, by value, from memory in some dtype."""
    if x is None:
        return 1.0, 0
    return (x, 2 + _DTYPES_OF_NUMBERS.index(x.dtype)) if isinstance(x, torch.Tensor) else (float(x), 1)
