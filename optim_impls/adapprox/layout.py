"""Writes the launch tables of Adapprox's kernels: a row of pointers, sizes and scratch offsets for every tensor.

The sizes come from `optplan.planner.optimizers.adapprox_layout`, so the planner knows them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch

from optplan.optim_impls.fingerprint import local_tensor
from optplan.optim_impls.optimizer_base import Member
from optplan.optim_impls.rounding import mix_seed
from optplan.planner.optimizers.adapprox_layout import NUM_FIELDS, MatrixLayout, vector_chunks

FIELDS = NUM_FIELDS


class Field(IntEnum):
    """Columns of a table row: pointers in bytes, sizes and a counter, offsets into scratch in fp32 elements."""

    W = 0
    G = 1
    M = 2
    Q = 3
    U = 4
    ROWS = 5
    COLUMNS = 6
    SEED = 7
    FIRST_A = 8
    BANDS_A = 9
    SPLITS_A = 10
    WIDTH_A = 11
    FIRST_B = 12
    BANDS_B = 13
    SPLITS_B = 14
    HEIGHT_B = 15
    NUM_SUMS = 16
    SHARES = 17
    FIRST_SHARE = 18
    COUNT = 19
    SUMS = 20
    SCALES = 21
    PEAKS = 22
    PARTIALS = 23
    TURN = 24
    START = 25
    REST = 26
    BASIS = 27
    Y = 28
    Z = 29


class Table(NamedTuple):
    """A launch table on the device.

    Attributes:
        rows: int64 [tensors, FIELDS].
        owners: int32: the row that each program works for: of pass A, of pass B, of what lies between.
        num_scratch: fp32 elements of scratch.
    """

    rows: torch.Tensor
    owners: tuple[torch.Tensor, ...]
    num_scratch: int


class TableImage:
    """The host image of a launch table, in pinned memory where a GPU is to read it.

    Attributes:
        counts: Programs of each tensor of owners.
    """

    def __init__(
        self, rows: list[list[int]], owners: Sequence[torch.Tensor], num_scratch: int, *, pinned: bool
    ) -> None:
        self.counts = [owner.numel() for owner in owners]
        self._num_rows, self._num_scratch = len(rows), num_scratch
        self._captured = False
        size = len(rows) * FIELDS * 8 + sum(self.counts) * 4
        self._image = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        views = self._views(self._image)
        views.rows.copy_(torch.tensor(rows, dtype=torch.int64))
        for view, owner in zip(views.owners, owners, strict=True):
            view.copy_(owner)

    def upload(self, device: torch.device) -> Table:
        """The table on `device`; the copy does not wait for the GPU. On the CPU it is the image itself."""
        if device.type == "cpu":
            return self._views(self._image)
        if torch.cuda.is_current_stream_capturing() and not self._captured:
            self._captured = True
            _IMAGES_OF_GRAPHS.append(self._image)
        buffer = torch.empty_like(self._image, device=device, pin_memory=False)
        return self._views(buffer.copy_(self._image, non_blocking=True))

    def _views(self, buffer: torch.Tensor) -> Table:
        split = self._num_rows * FIELDS * 8
        owners = torch.split(buffer[split:].view(torch.int32), self.counts)
        return Table(buffer[:split].view(torch.int64).view(-1, FIELDS), owners, self._num_scratch)


_IMAGES_OF_GRAPHS: list[torch.Tensor] = []
"""Images that a CUDA graph reads at every replay; kept, because nothing tells when the graph dies."""


def matrix_table(members: Sequence[Member], layouts: Sequence[MatrixLayout], *, seed: int) -> TableImage:
    """The image of the table for one round of launches."""
    rows: list[list[int]] = []
    offset = first_a = first_b = first_share = 0
    for member, layout in zip(members, layouts, strict=True):
        row = _pointers(member, "q_factor", "u_factor")
        a, b = layout.pass_a, layout.pass_b
        row |= {Field.ROWS: layout.rows, Field.COLUMNS: layout.columns, Field.SEED: mix_seed(seed, 0, member.ordinal)}
        row |= {Field.FIRST_A: first_a, Field.BANDS_A: a.bands, Field.SPLITS_A: a.splits, Field.WIDTH_A: a.length}
        row |= {Field.FIRST_B: first_b, Field.BANDS_B: b.bands, Field.SPLITS_B: b.splits, Field.HEIGHT_B: b.length}
        row |= {Field.NUM_SUMS: a.programs, Field.SHARES: layout.shares, Field.FIRST_SHARE: first_share}
        row[Field.COUNT] = 0
        for name, numel in layout.parts().items():
            row[Field[name.upper()]] = offset
            offset += numel
        first_a, first_b, first_share = first_a + a.programs, first_b + b.programs, first_share + layout.shares
        rows.append([row[field] for field in Field])
    counts = zip(*((x.pass_a.programs, x.pass_b.programs, x.shares) for x in layouts), strict=True)
    owners = [_owners(programs) for programs in counts]
    return TableImage(rows, owners, offset, pinned=members[0].parameter.is_cuda)


def vector_table(members: Sequence[Member]) -> TableImage:
    """The image of the table for vectors: the second moment stands where a matrix has Q."""
    rows, first = [], 0
    chunks = [vector_chunks(member.parameter.numel()) for member in members]
    for member, count in zip(members, chunks, strict=True):
        row = dict.fromkeys(Field, 0) | _pointers(member, "exp_avg_sq", None)
        row |= {Field.ROWS: member.parameter.numel(), Field.FIRST_A: first, Field.SUMS: first, Field.NUM_SUMS: count}
        first += count
        rows.append([row[field] for field in Field])
    return TableImage(rows, [_owners(chunks)], first, pinned=members[0].parameter.is_cuda)


def _pointers(member: Member, second: str, third: str | None) -> dict[Any, int]:
    state = member.state
    tensors = {Field.W: member.parameter, Field.G: member.gradient, Field.M: state.get("exp_avg")}
    tensors |= {Field.Q: state[second], Field.U: state[third] if third else None}
    return {field: 0 if tensor is None else local_tensor(tensor).data_ptr() for field, tensor in tensors.items()}


def _owners(counts: Sequence[int]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(counts), dtype=torch.int32), torch.tensor(counts))
