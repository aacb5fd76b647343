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
from optplan.planner.optimizers.adapprox_layout import NUM_FIELDS, MatrixLayout, table_places, vector_chunks

FIELDS = NUM_FIELDS


class Field(IntEnum):
    """Columns of a table row: pointers in bytes, sizes and a counter, offsets into scratch in fp32 elements.

    STEP points to the number of the step where it lies on the device, BANDS_A counts a vector's programs.
    """

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
    STEP = 16
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
        image: Its contents on the host.
        buffer: uint8, holds it among others.
        first_byte: Where it begins there.
    """

    image: TableImage
    buffer: torch.Tensor
    first_byte: int

    @property
    def num_scratch(self) -> int:
        """The fp32 elements of scratch."""
        return self.image.num_scratch

    @property
    def rows(self) -> torch.Tensor:
        """int64 [tensors * FIELDS]."""
        return self._part(self.first_byte, self.first_byte + self.image.num_row_bytes, torch.int64)

    @property
    def owners(self) -> list[torch.Tensor]:
        """int32: the row that each program works for: of pass A, of pass B, of what lies between."""
        firsts = [self.first_byte + first for first in self.image.firsts]
        counts = self.image.counts
        return [self._part(at, at + 4 * count, torch.int32) for at, count in zip(firsts, counts, strict=True)]

    def addresses(self) -> tuple[int, list[int]]:
        """Where rows and owners begin: to make a tensor of each would cost the host more than to launch."""
        begin = self.buffer.data_ptr() + self.first_byte
        return begin, [begin + first for first in self.image.firsts]

    def _part(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        return self.buffer[first:last].view(dtype)


class TableImage:
    """The contents of a launch table.

    Attributes:
        counts: Programs of each tensor of owners.
        num_scratch: fp32 elements of scratch.
        num_row_bytes: Bytes of the rows, which come first.
        firsts: Where each tensor of owners begins, in bytes.
        content: uint8: rows, then owners.
    """

    def __init__(self, rows: list[list[int]], owners: Sequence[torch.Tensor], num_scratch: int) -> None:
        self.counts = [owner.numel() for owner in owners]
        self.num_scratch, self.num_row_bytes = num_scratch, len(rows) * FIELDS * 8
        self.firsts = [self.num_row_bytes + 4 * sum(self.counts[:place]) for place in range(len(owners))]
        parts = [torch.tensor(rows, dtype=torch.int64).flatten(), *owners]
        self.content = torch.cat([part.view(torch.uint8) for part in parts])


class TableUpload:
    """Launch tables one after the other, in pinned memory where a GPU is to read them: one copy brings them all."""

    def __init__(self, images: Sequence[TableImage], device: torch.device) -> None:
        self._images, self._device = list(images), device
        self._firsts, size = table_places([image.content.numel() for image in images])
        self._content = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        for image, first in zip(images, self._firsts, strict=True):
            self._content[first : first + image.content.numel()] = image.content
        self._captured = False

    def __call__(self) -> list[Table]:
        """The tables on the device; the copy does not wait for the GPU. On the CPU they are the contents themselves."""
        buffer = self._content
        if self._device.type == "cuda":
            if torch.cuda.is_current_stream_capturing() and not self._captured:
                self._captured = True
                _CONTENTS_OF_GRAPHS.append(self._content)
            buffer = torch.empty_like(self._content, device=self._device, pin_memory=False)
            buffer.copy_(self._content, non_blocking=True)
        return [Table(image, buffer, first) for image, first in zip(self._images, self._firsts, strict=True)]


_CONTENTS_OF_GRAPHS: list[torch.Tensor] = []
"""Tables that a CUDA graph reads at every replay; kept, because nothing tells when the graph dies."""


def matrix_table(members: Sequence[Member], layouts: Sequence[MatrixLayout], *, seed: int) -> TableImage:
    """The image of the table for one round of launches."""
    passes = [[layout.pass_a for layout in layouts], [layout.pass_b for layout in layouts]]
    dealt = [_deal([one.programs for one in of], [one.length for one in of]) for of in passes]
    shares = [layout.shares for layout in layouts]
    dealt.append(_deal(shares, [max(x.rows, x.columns) // n for x, n in zip(layouts, shares, strict=True)]))
    rows: list[list[int]] = []
    offset = 0
    for place, (member, layout, a, b) in enumerate(zip(members, layouts, *passes, strict=True)):
        row = _pointers(member, "q_factor", "u_factor")
        row |= {Field.ROWS: layout.rows, Field.COLUMNS: layout.columns, Field.SEED: mix_seed(seed, 0, member.ordinal)}
        row |= {Field.BANDS_A: a.bands, Field.SPLITS_A: a.splits, Field.WIDTH_A: a.length}
        row |= {Field.BANDS_B: b.bands, Field.SPLITS_B: b.splits, Field.HEIGHT_B: b.length}
        row |= {Field.STEP: _step_pointer(member), Field.SHARES: layout.shares, Field.COUNT: 0}
        for field, (firsts, _) in zip((Field.FIRST_A, Field.FIRST_B, Field.FIRST_SHARE), dealt, strict=True):
            row[field] = firsts[place]
        for name, numel in layout.parts().items():
            row[Field[name.upper()]] = offset
            offset += numel
        rows.append([row[field] for field in Field])
    return TableImage(rows, [owners for _, owners in dealt], offset)


def vector_table(members: Sequence[Member]) -> TableImage:
    """The image of the table for vectors: the second moment stands where a matrix has Q."""
    rows, first = [], 0
    chunks = [vector_chunks(member.parameter.numel()) for member in members]
    for member, count in zip(members, chunks, strict=True):
        row = dict.fromkeys(Field, 0) | _pointers(member, "exp_avg_sq", None)
        row |= {Field.ROWS: member.parameter.numel(), Field.FIRST_A: first, Field.SUMS: first, Field.BANDS_A: count}
        first += count
        rows.append([row[field] for field in Field])
    return TableImage(rows, [_deal(chunks, [0] * len(chunks))[1]], first)


def _pointers(member: Member, second: str, third: str | None) -> dict[Any, int]:
    state = member.state
    tensors = {Field.W: member.parameter, Field.G: member.gradient, Field.M: state.get("exp_avg")}
    tensors |= {Field.Q: state[second], Field.U: state[third] if third else None}
    return {field: 0 if tensor is None else local_tensor(tensor).data_ptr() for field, tensor in tensors.items()}


def _step_pointer(member: Member) -> int:
    step = member.state["step"]
    return step.data_ptr() if step.device == member.parameter.device else 0


def _deal(counts: Sequence[int], lengths: Sequence[int]) -> tuple[list[int], torch.Tensor]:
    """The first program of each tensor, and each program's tensor.

    Long programs come first, so that at the end of a launch no multiprocessor is left alone with one.
    """
    firsts, end = [0] * len(counts), 0
    order = sorted(range(len(counts)), key=lambda place: -lengths[place])
    for place in order:
        firsts[place] = end
        end += counts[place]
    places = torch.tensor(order, dtype=torch.int32)
    return firsts, torch.repeat_interleave(places, torch.tensor([counts[place] for place in order]))
