"""Adapprox's kernels where ranks hold different rows of a matrix: one process's launches, with sums over the ranks.

What `sharded.py` says of the stages holds here, but that no peaks are sought. Between the launches every rank replaces
what its kernels made of its own rows' Gram matrices by what all rows give. A matrix of which this rank has no rows is
left out of the launches; the rank adds nothing to its sums and still receives its U.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from optplan.optim_impls.adapprox.launcher import Numbers, Wave, step_wave
from optplan.optim_impls.adapprox.layout import TableUpload
from optplan.optim_impls.adapprox.sharded import RowBatch, Together, over
from optplan.optim_impls.adapprox.subspace import FIRST_SHIFT, SECOND_SHIFT
from optplan.optim_impls.fingerprint import local_tensor
from optplan.optim_impls.launch import is_aligned
from optplan.optim_impls.optimizer_base import Member, tensors_of
from optplan.optim_impls.sharding import RowShards, shards_of
from optplan.planner.optimizers.adapprox_layout import MatrixLayout, waves

_SMALLEST = 1e-36
"""Sum of squares of a sketch's column up to which the kernels count it as empty."""


class MatrixScratch(NamedTuple):
    """Where a wave keeps the scratch of a matrix of which this rank has rows; offsets in fp32 elements."""

    layout: MatrixLayout
    offset: int

    def part(self, scratch: Tensor, name: str) -> Tensor:
        """One part of it."""
        parts = self.layout.parts()
        names = list(parts)
        first = self.offset + sum(parts[other] for other in names[: names.index(name)])
        return scratch[first : first + parts[name]]


class RankSums:
    """What ranks tell each other between the launches of one wave: a collective a stage.

    Args:
        matrices: The wave's matrices on this rank, None where it has no rows.
        numels: Elements of the whole matrices.
        factors: U of each.
        wide: Columns of the sketches.
        together: Combines over the ranks.
    """

    def __init__(
        self,
        matrices: Sequence[MatrixScratch | None],
        numels: Sequence[int],
        factors: Sequence[Tensor],
        *,
        wide: int,
        together: Together,
    ) -> None:
        self._present = [matrix for matrix in matrices if matrix is not None]
        self._has_rows = [matrix is not None for matrix in matrices]
        self._factors, self._wide, self._together = list(factors), wide, together
        device = factors[0].device
        shares = [0 if matrix is None else matrix.layout.shares for matrix in matrices]
        num_sums = [0 if matrix is None else matrix.layout.pass_a.programs for matrix in matrices]
        self._shares, self._num_sums = torch.tensor(shares, device=device), torch.tensor(num_sums, device=device)
        self._numels = torch.tensor(numels, dtype=torch.float32, device=device)
        self._eye = torch.eye(wide, device=device)

    def first_turn(self, scratch: Tensor, *, clip: float) -> None:
        """What makes the sketches nearly orthonormal, and the clips."""
        partial = [m.part(scratch, "sums")[: m.layout.pass_a.programs] for m in self._present]
        sums = _segment_sums(partial, self._num_sums, like=scratch.new_empty(0))
        grams, totals = self._together([self._own_grams(scratch), sums], "sum")
        diagonal = grams.diagonal(dim1=1, dim2=2)
        units = torch.where(diagonal > _SMALLEST, diagonal.clamp(min=_SMALLEST).rsqrt(), 0)
        turns = self._inverses(grams * units[:, :, None] * units[:, None, :] + FIRST_SHIFT * self._eye)
        self._write(scratch, "turn", units[:, :, None] * turns)
        scales = 1 / (totals / self._numels).sqrt().div_(clip).clamp_(min=1)
        # The second iteration's sketch is brought near 1 by the longest column of the first, as `gram_kernel` does it.
        sizes = torch.where(units > 0, units, 1e18).amin(dim=1)
        self._write(scratch, "scales", torch.stack([scales, sizes], dim=1), at=1)

    def second_turn(self, scratch: Tensor) -> None:
        """What makes the nearly orthonormal sketches orthonormal."""
        (grams,) = self._together([self._own_grams(scratch)], "sum")
        self._write(scratch, "turn", self._inverses(grams + SECOND_SHIFT * self._eye))

    def start_again(self, scratch: Tensor) -> None:
        """X of the second iteration, of which each rank has what its rows add."""
        remaining = iter(self._present)
        own = [
            next(remaining).part(scratch, "z")[: u.shape[0] * self._wide]
            if has
            else u.new_zeros(u.shape[0] * self._wide)
            for u, has in zip(self._factors, self._has_rows, strict=True)
        ]
        torch._foreach_copy_(own, self._together(own, "sum"))

    def factors(self) -> None:
        """U of every matrix, of which each rank has what its rows add."""
        partial = [u if own else torch.zeros_like(u) for u, own in zip(self._factors, self._has_rows, strict=True)]
        torch._foreach_copy_(self._factors, self._together(partial, "sum"))

    def take_part(self, *, twice: bool = False) -> None:
        """All stages, where this rank has no rows of any matrix."""
        nothing = self._numels.new_empty(0)
        if twice:
            self.first_turn(nothing, clip=1.0)
            self.second_turn(nothing)
            self.start_again(nothing)
        self.first_turn(nothing, clip=1.0)
        self.second_turn(nothing)
        self.factors()

    def _own_grams(self, scratch: Tensor) -> Tensor:
        """The Gram matrices of this rank's rows, `[matrices, wide, wide]`."""
        square = self._wide**2
        partial = [m.part(scratch, "partials")[: m.layout.shares * square].view(-1, square) for m in self._present]
        return _segment_sums(partial, self._shares, like=scratch.new_empty(0, square)).view(-1, self._wide, self._wide)

    def _inverses(self, grams: Tensor) -> Tensor:
        """L⁻ᵀ for each L Lᵀ."""
        lower = torch.linalg.cholesky_ex(grams).L
        found: Tensor = torch.linalg.solve_triangular(lower, self._eye.expand_as(lower), upper=False).mT
        return found

    def _write(self, scratch: Tensor, name: str, values: Tensor, *, at: int = 0) -> None:
        """Put values `[matrices, ...]` into a part of each matrix's scratch."""
        own = [value.reshape(-1) for value, has in zip(values.unbind(), self._has_rows, strict=True) if has]
        if own:
            parts = [matrix.part(scratch, name) for matrix in self._present]
            torch._foreach_copy_([part[at : at + len(own[0])] for part in parts], own)


class RowWave(NamedTuple):
    """One round: its launches and their table, or None where this rank has no rows, and its collectives."""

    launches: Wave | None
    upload: TableUpload | None
    sums: RankSums


def step_matrices_on_ranks(batch: RowBatch, *, seed: int, numbers: Numbers, again: int) -> None:
    """Update matrices whose rows lie on several ranks, round by round.

    Sums over ranks cannot be left out by what the device knows: with `again` of 2 every step iterates once.
    """
    twice = again == 1
    if "waves" not in batch.scratch:
        batch.scratch["waves"] = _row_waves(batch, seed=seed)
    for wave in batch.scratch["waves"]:
        if wave.launches is None or wave.upload is None:
            wave.sums.take_part(twice=twice)
        else:
            (table,) = wave.upload()
            step_wave(wave.launches, table, batch.device, numbers, again=int(twice), sums=wave.sums)


def _row_waves(batch: RowBatch, *, seed: int) -> list[RowWave]:
    """Rounds that every rank divides alike: by the whole matrices."""
    members = [m._replace(state={k: local_tensor(v) for k, v in m.state.items()}) for m in batch.members]
    shards = [shards_of(part) for part in batch.parts]
    whole = [_layout(one.shape[0], member) for one, member in zip(shards, members, strict=True)]
    together = over(shards[0].group)
    return [
        _row_wave([members[i] for i in places], [shards[i] for i in places], seed=seed, together=together)
        for places in waves(whole)
    ]


def _row_wave(members: list[Member], shards: list[RowShards], *, seed: int, together: Together) -> RowWave:
    present = [member for member in members if len(member.parameter)]
    layouts = [_layout(len(member.parameter), member) for member in present]
    matrices: list[MatrixScratch | None] = []
    offset, remaining = 0, iter(layouts)
    for member in members:
        layout = next(remaining) if len(member.parameter) else None
        matrices.append(None if layout is None else MatrixScratch(layout, offset))
        offset += 0 if layout is None else sum(layout.parts().values())
    launches = upload = None
    if present:
        aligned = is_aligned(*(t for m in present for t in (m.parameter, m.gradient, *tensors_of(m.state))))
        launches = Wave(present, layouts, seed=seed, aligned=aligned)
        upload = TableUpload([launches.image], members[0].parameter.device)
    factors, wide = [member.state["u_factor"] for member in members], _layout(1, members[0]).padded_rank
    sums = RankSums(matrices, [one.numel for one in shards], factors, wide=wide, together=together)
    return RowWave(launches, upload, sums)


def _layout(rows: int, member: Member) -> MatrixLayout:
    u = member.state["u_factor"]
    return MatrixLayout(rows, u.shape[0], u.shape[1])


def _segment_sums(partial: Sequence[Tensor], lengths: Tensor, *, like: Tensor) -> Tensor:
    """The sum of each matrix's partial results, in a fixed order; zeros for a matrix without any."""
    data = torch.cat(list(partial)) if partial else like
    return torch.segment_reduce(data, "sum", lengths=lengths, axis=0, initial=0, unsafe=True)
