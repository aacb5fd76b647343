"""The device table that lets one kernel launch serve many tensors.

A Triton kernel takes no list of pointers by value. So each step uploads one table, whose size `planner` knows
(`optplan.planner.optimizers.launch`): a row for every tensor (the pointer of each of its lists, its number of elements,
its ordinal among the optimizer's parameters), and for every chunk of elements the row it belongs to and its offset.
The table's image in pinned host memory is kept and written anew only when a pointer moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from optplan.planner.optimizers.launch import CHUNK_NUMEL, NUM_EXTRA_COLUMNS

_ALIGNMENT_BYTES = 16


class LaunchTable(NamedTuple):
    """A table on the device, as a kernel takes it.

    Attributes:
        rows: int64 [tensors, lists + 2]: pointers in bytes, then elements, then ordinal.
        chunk_offset: int64 [chunks]: the first element of each chunk in its tensor.
        chunk_row: int32 [chunks]: the row of each chunk's tensor.
        num_chunks: Chunks of all tensors together.
        buffer: uint8: the one allocation behind the three.
    """

    rows: torch.Tensor
    chunk_offset: torch.Tensor
    chunk_row: torch.Tensor
    num_chunks: int
    buffer: torch.Tensor


class TableImage:
    """The host image of one launch's table.

    Args:
        num_lists: Pointers of a tensor: parameter, gradient, state tensors.
        chunk_numel: Elements of a chunk, one number for all tensors.
    """

    def __init__(self, *, num_lists: int, chunk_numel: int = CHUNK_NUMEL) -> None:
        self._num_columns = num_lists + NUM_EXTRA_COLUMNS
        self._chunk_numel = chunk_numel
        self._pointers: list[int] = []
        self._num_chunks = 0
        self._image: torch.Tensor | None = None
        self._captured: list[torch.Tensor] = []

    def upload(self, rows: Sequence[Sequence[torch.Tensor]], ordinals: Sequence[int]) -> LaunchTable:
        """Put the table on the device of the first tensor; the copy does not wait for the GPU.

        Args:
            rows: For each tensor its lists: parameter, gradient, state tensors, all of the parameter's numel or read by
                the kernel as it sees fit.
            ordinals: For each tensor a number that does not depend on which others take part.
        """
        pointers = [tensor.data_ptr() for row in rows for tensor in row]
        device = rows[0][0].device
        if self._image is None or pointers != self._pointers:
            self._write(rows, pointers, ordinals, pinned=device.type == "cuda")
        image = self._image
        assert image is not None
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._captured.append(image)  # the graph reads it at every replay
        buffer = (
            image if device.type == "cpu" else torch.empty_like(image, device=device).copy_(image, non_blocking=True)
        )
        return self._views(buffer)

    def _write(
        self, rows: Sequence[Sequence[torch.Tensor]], pointers: list[int], ordinals: Sequence[int], *, pinned: bool
    ) -> None:
        num_lists = self._num_columns - NUM_EXTRA_COLUMNS
        numels = torch.tensor([row[0].numel() for row in rows], dtype=torch.int64)
        num_chunks = (numels + self._chunk_numel - 1).div(self._chunk_numel, rounding_mode="floor")
        self._num_chunks, self._pointers = int(num_chunks.sum()), pointers
        size = len(rows) * self._num_columns * 8 + self._num_chunks * 12
        # A new image each time: the old one may still be on its way to the GPU (torch keeps it until then).
        self._image = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        table = self._views(self._image)
        table.rows[:, :num_lists] = torch.tensor(pointers, dtype=torch.int64).view(len(rows), num_lists)
        table.rows[:, num_lists] = numels
        table.rows[:, num_lists + 1] = torch.tensor(ordinals, dtype=torch.int64)
        row = torch.repeat_interleave(torch.arange(len(rows)), num_chunks)
        first = num_chunks.cumsum(0) - num_chunks
        table.chunk_row.copy_(row)
        table.chunk_offset.copy_((torch.arange(self._num_chunks) - first[row]) * self._chunk_numel)

    def _views(self, buffer: torch.Tensor) -> LaunchTable:
        chunk_bytes = self._num_chunks * 12
        rows = buffer[: buffer.numel() - chunk_bytes].view(torch.int64).view(-1, self._num_columns)
        chunks = buffer[buffer.numel() - chunk_bytes :]
        offsets, chunk_row = chunks.split([self._num_chunks * 8, self._num_chunks * 4])
        return LaunchTable(rows, offsets.view(torch.int64), chunk_row.view(torch.int32), self._num_chunks, buffer)


def is_aligned(*tensors: torch.Tensor) -> bool:
    """Whether every tensor begins at a multiple of 16 bytes, as vector loads need."""
    together = 0
    for tensor in tensors:
        together |= tensor.data_ptr()
    return together % _ALIGNMENT_BYTES == 0
