"""Adapprox as a `torch.optim.Optimizer`, in the paper's mode and in a fast one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch

from optplan.optim_impls.adapprox.layout import TableImage, TableUpload
from optplan.optim_impls.adapprox.reference import (
    RankRule,
    Rates,
    Sketch,
    as_rsi,
    low_rank_second_moment,
    s_rsi,
    seeded_sketch,
    updated,
)
from optplan.optim_impls.adapprox.sharded import RowBatch, step_by_rows
from optplan.optim_impls.adapprox.subspace import iterates_twice, step_matrix, uniform_start
from optplan.optim_impls.checks import check_at_least_zero, check_betas, check_choice
from optplan.optim_impls.fingerprint import local_tensor
from optplan.optim_impls.optimizer_base import Batch, GradScale, GroupPlan, KernelOptimizer, Member, Part, member_of
from optplan.optim_impls.rounding import mix_seed
from optplan.optim_impls.sharding import divide_apart, row_shards
from optplan.optim_impls.step_counters import State
from optplan.planner.optimizers.adapprox import DEFAULT_RANK, max_rank
from optplan.planner.optimizers.adapprox_layout import MAX_KERNEL_RANK, MatrixLayout

MODES = ("fast", "paper")
STATE_DTYPES = (None, torch.float32, torch.bfloat16)


class Adapprox(KernelOptimizer):
    """Adam whose second moment is a product of two thin factors (Zhao et al. 2024, arXiv 2403.14958).

    A matrix keeps Q `[rows, rank]` and U `[columns, rank]`; a tensor of more dimensions counts as `[first, rest]`; a
    vector, or a matrix with one row or column, keeps its second moment whole. Factors and second moments are fp32 (fp64
    for fp64 parameters): in bf16 a second moment cannot decay at beta2 = 0.999. There is no bias correction.

    With FSDP2 the fast mode factors the whole matrix: each rank keeps its rows of Q and of the moments, and all of
    U, which is the same on every rank. The factors' rank is that of the whole matrix. Sums over rows are added up
    over the ranks, in at most four collectives for all matrices of one rank (eight in the first eight steps). A
    step is that of one process up to the order of fp32 sums, and a checkpoint loads on any number of ranks.

    Args:
        params: Parameters or param groups.
        lr: Learning rate, a number; with `capturable` also a scalar tensor on the device.
        betas: Decays of both moments; with `beta1` = 0 no first moment is kept.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled: `lr * weight_decay` of the parameter is taken off each step.
        clip: RMS that a tensor's direction may have at most.
        rank: Rank of the factors, at most a quarter of the smaller side; `max` for that quarter; `adaptive` (paper mode
            only) to choose it every `rank_rule.every` steps, with room for the quarter reserved.
        mode: `fast` starts each range finder from the last step's factor, multiplies once (twice in a tensor's first
            eight steps) and never forms the second moment of a matrix; `paper` draws a new sketch, multiplies five
            times and forms it.
        rank_rule: How an adaptive rank grows.
        guidance_cap: Most that the cosine guidance may multiply a step by, or None for no guidance (paper mode only).
        state_dtype: Dtype of the first moment: torch.float32, torch.bfloat16, or None for the parameter's.
        seed: Of the sketches, which also depend on the step and the parameter's place, on nothing else.
        backend: `auto`, `triton` or `torch`; the paper mode and ranks above 64 always run in torch.
        capturable: Keep the step counters on the device, so that a CUDA graph may record `step()` in the fast mode. On
            row shards every step then multiplies once.

    Raises:
        ValueError: An argument is out of range.
        TypeError: A parameter is not of real floating-point numbers.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        clip: float = 1.0,
        rank: int | str = DEFAULT_RANK,
        mode: str = "fast",
        rank_rule: RankRule | None = None,
        guidance_cap: float | None = None,
        state_dtype: torch.dtype | None = None,
        seed: int = 0,
        backend: str = "auto",
        capturable: bool = False,
    ) -> None:
        self._rank_rule = rank_rule or RankRule()
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "clip": clip}
        defaults |= {"rank": rank, "mode": mode, "guidance_cap": guidance_cap, "state_dtype": state_dtype, "seed": seed}
        super().__init__(params, defaults, backend=backend, capturable=capturable)

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "eps", "weight_decay"):
            check_at_least_zero(name, group[name])
        check_betas(group["betas"])
        check_choice("mode", group["mode"], MODES)
        check_choice("state_dtype", group["state_dtype"], STATE_DTYPES)
        if not float(group["clip"]) > 0:
            raise ValueError(f"clip must be > 0, got {float(group['clip'])}")
        _check_rank(group["rank"])
        if group["mode"] == "fast" and group["rank"] == "adaptive":
            raise ValueError("rank='adaptive' needs mode='paper', got mode='fast'; give the fast mode an integer")
        if group["guidance_cap"] is not None and group["mode"] == "fast":
            raise ValueError("guidance_cap needs mode='paper', got mode='fast'")

    def _new_state(self, parameter: torch.Tensor, group: dict[str, Any]) -> State:
        state: State = {}
        shards = row_shards(parameter, optimizer="Adapprox")
        if shards is not None and group["mode"] == "paper":
            raise ValueError(
                f"mode='paper' takes whole tensors, got one of shape {shards.shape} on {shards.num_ranks} ranks; "
                f"use mode='fast'"
            )
        if group["betas"][0]:
            state["exp_avg"] = torch.zeros_like(parameter, dtype=group["state_dtype"] or parameter.dtype)
        local = local_tensor(parameter)
        dtype, shape = _working_dtype(parameter), _matrix_shape(parameter)
        if shape is None:
            return state | {"exp_avg_sq": torch.zeros_like(parameter, dtype=dtype)}
        rank, largest = group["rank"], max_rank(*shape)
        width = min(rank, largest) if isinstance(rank, int) else largest
        q = local.new_zeros(local.shape[0], width, dtype=dtype)
        state["q_factor"] = q if shards is None else shards.join(q, shape[0])
        state["u_factor"] = local.new_zeros(shape[1], width, dtype=dtype)
        if group["mode"] == "paper":
            state["rank"] = 0
        return state

    def _divide(self, parts: Sequence[Part], steps: Sequence[float]) -> list[Batch]:
        return divide_apart(
            parts,
            steps,
            apart=lambda part: row_shards(part.parameter, optimizer="Adapprox") is not None,
            divide=super()._divide,
            new_batch=lambda part, place: RowBatch(lead=place, triton=self._use_triton(member_of(part)), aligned=False),
            kind=lambda part: "q_factor" in part.state and part.state["q_factor"].shape[1],
        )

    def _kernels_take(self, member: Member) -> bool:
        q = member.state.get("q_factor")
        fits = q is None or (q.shape[1] <= MAX_KERNEL_RANK and "rank" not in member.state)
        return fits and super()._kernels_take(member)

    def _before_batches(self, plan: GroupPlan, group: dict[str, Any], grad_scale: GradScale) -> None:
        """Bring the launch tables of all kernels to their devices, in one copy each."""
        del grad_scale
        if plan.scratch.get("batches") is not plan.batches:
            plan.scratch.update(batches=plan.batches, uploads=self._new_uploads(plan.batches, group["seed"]))
        for upload, batches in plan.scratch["uploads"]:
            tables = iter(upload())
            for batch in batches:
                batch.scratch["tables"] = list(islice(tables, batch.scratch["num_tables"]))

    def _new_uploads(self, batches: Sequence[Batch], seed: int) -> list[tuple[TableUpload, list[Batch]]]:
        uploads: dict[torch.device, tuple[list[TableImage], list[Batch]]] = {}
        for batch in batches:
            if batch.triton and not isinstance(batch, RowBatch):
                # Triton is not there on every machine that can run the reference.
                from optplan.optim_impls.adapprox.launcher import table_images

                images, served = uploads.setdefault(batch.device, ([], []))
                new = table_images(batch, _layout, seed=seed)
                batch.scratch["num_tables"] = len(new)
                images += new
                served.append(batch)
        return [(TableUpload(images, device), served) for device, (images, served) in uploads.items()]

    def _step_triton(self, batch: Batch, group: dict[str, Any], grad_scale: GradScale) -> None:
        # Triton is not there on every machine that can run the reference.
        from optplan.optim_impls.adapprox.launcher import Numbers, step_matrices, step_vectors

        lr = group["lr"] if self.defaults["capturable"] else float(group["lr"])
        numbers = Numbers(_rates(group), lr, grad_scale)
        # Not the members': to make them at every step costs the host more than all launches.
        is_matrices = "q_factor" in batch.parts[0].state
        if isinstance(batch, RowBatch) and is_matrices:
            from optplan.optim_impls.adapprox.sharded_launcher import step_matrices_on_ranks

            step_matrices_on_ranks(batch, seed=group["seed"], numbers=numbers, again=_again(batch))
        elif isinstance(batch, RowBatch):
            step_by_rows(batch, _rates(group, lr=float(lr)), seed=group["seed"], grad_scale=grad_scale)
        elif is_matrices:
            step_matrices(batch, batch.scratch.pop("tables"), numbers=numbers, again=_again(batch))
        else:
            step_vectors(batch, *batch.scratch.pop("tables"), numbers=numbers)

    def _step_torch(self, batch: Batch, group: dict[str, Any], grad_scale: GradScale) -> None:
        rates = _rates(group, lr=float(group["lr"]))
        if isinstance(batch, RowBatch):
            step_by_rows(batch, rates, seed=group["seed"], grad_scale=grad_scale)
            return
        for member in batch.members:
            step = batch.step or int(member.state["step"])
            gradient = member.gradient if grad_scale is None else member.gradient * grad_scale
            self._step_member(member, gradient, group, rates, step)

    def _step_member(
        self, member: Member, gradient: torch.Tensor, group: dict[str, Any], rates: Rates, step: int
    ) -> None:
        state, w = member.state, member.parameter
        m = local_tensor(state["exp_avg"]) if "exp_avg" in state else None
        if "q_factor" not in state:
            _step_vector(w, gradient, m, local_tensor(state["exp_avg_sq"]), rates, step)
            return
        q, u = state["q_factor"], state["u_factor"]
        shape = (q.shape[0], u.shape[0])
        matrices = (_as_matrix(w, shape), gradient.reshape(shape), None if m is None else _as_matrix(m, shape))
        if group["mode"] == "paper":
            sketch = seeded_sketch(group["seed"], step=step, index=member.ordinal, like=q)
            rule = self._rank_rule if group["rank"] == "adaptive" else None
            _step_as_paper(*matrices, state, rates, step, sketch, rule)
        else:
            start = uniform_start(mix_seed(group["seed"], 0, member.ordinal), like=q)
            step_matrix(*matrices, q, u, rates, start, twice=iterates_twice(step))
        for target, matrix in zip((w, m), (matrices[0], matrices[2]), strict=True):
            if target is not None and matrix is not None and matrix.data_ptr() != target.data_ptr():
                target.copy_(matrix.view(target.shape))


def _step_as_paper(
    w: torch.Tensor,
    gradient: torch.Tensor,
    momentum: torch.Tensor | None,
    state: State,
    rates: Rates,
    step: int,
    sketch: Sketch,
    rule: RankRule | None,
) -> None:
    q_all, u_all, rank = state["q_factor"], state["u_factor"], state["rank"]
    g, largest = gradient.to(q_all.dtype), q_all.shape[1]
    v = low_rank_second_moment(q_all[:, :rank], u_all[:, :rank], g, rates.beta2)
    if rule is None:
        q, u = s_rsi(v, largest, sketch)
    else:
        q, u = as_rsi(v, step, rank or rule.first, largest, sketch, rule)
    for factor, found in ((q_all, q), (u_all, u)):
        factor.zero_()[:, : found.shape[1]] = found
    state["rank"] = q.shape[1]
    _store_update(w, g, v, momentum, step, rates)


def _step_vector(
    w: torch.Tensor, gradient: torch.Tensor, momentum: torch.Tensor | None, v: torch.Tensor, rates: Rates, step: int
) -> None:
    g = gradient.to(v.dtype)
    v.mul_(rates.beta2).addcmul_(g, g, value=1 - rates.beta2)
    _store_update(w, g, v, momentum, step, rates)


def _store_update(
    w: torch.Tensor, g: torch.Tensor, v: torch.Tensor, momentum: torch.Tensor | None, step: int, rates: Rates
) -> None:
    m = None if momentum is None else momentum.to(v.dtype)
    new_w, new_m = updated(w.to(v.dtype), g, v, m, step, rates)
    w.copy_(new_w)
    if momentum is not None and new_m is not None:
        momentum.copy_(new_m)


def _again(batch: Batch) -> int:
    """Whether kernels iterate twice (1) or not (0), or the device is to tell (2)."""
    return int(iterates_twice(batch.step)) if batch.step else 2


def _rates(group: dict[str, Any], *, lr: float = 0.0) -> Rates:
    beta1, beta2 = group["betas"]
    return Rates(lr, beta1, beta2, group["eps"], group["weight_decay"], group["clip"], group["guidance_cap"])


def _check_rank(rank: Any) -> None:
    known = rank in ("adaptive", "max") if isinstance(rank, str) else isinstance(rank, int) and rank >= 1
    if not known:
        raise ValueError(f"rank must be adaptive, max or an integer >= 1, got {rank!r}")


def _working_dtype(parameter: torch.Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype is torch.float64 else torch.float32


def _matrix_shape(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Rows and columns in which a tensor is factored; None for vectors and empty tensors. As in the planner."""
    if tensor.dim() < 2:
        return None
    shape = (tensor.shape[0], math.prod(tensor.shape[1:]))
    return shape if min(shape) >= 2 else None


def _as_matrix(tensor: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The tensor as a matrix over the same memory where its strides allow, else a copy."""
    return tensor.reshape(shape)


def _layout(member: Member) -> MatrixLayout:
    q, u = member.state["q_factor"], member.state["u_factor"]
    return MatrixLayout(q.shape[0], u.shape[0], q.shape[1])
