"""The device table that lets one kernel launch serve many tensors.

A Triton kernel takes no list of pointers by value. So each step uploads one table, whose size `planner` knows
(`optplan.planner.optimizers.launch`): a row for every tensor (the pointer of each of its lists, its number of elements,
its ordinal among the optimizer's parameters), and for every chunk of elements the row it belongs to and its offset.
The table's image in pinned host memory is kept and written anew only when a pointer moved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
    """The host image of one launch's table, good for as long as no tensor moves.

    Args:
        rows: For each tensor its lists: the parameter, then whatever the kernel reads and writes beside it.
        ordinals: For each tensor a number that does not depend on which others take part.
        chunk_numel: Elements of a chunk.
    """

    def __init__(
        self, rows: Sequence[Sequence[torch.Tensor]], ordinals: Sequence[int], *, chunk_numel: int = CHUNK_NUMEL
    ) -> None:
        numels = torch.tensor([row[0].numel() for row in rows], dtype=torch.int64)
        per_row = (numels + chunk_numel - 1).div(chunk_numel, rounding_mode="floor")
        self.num_rows, self.num_chunks = len(rows), int(per_row.sum())
        self.device = rows[0][0].device
        self._num_columns = len(rows[0]) + NUM_EXTRA_COLUMNS
        self._captured = False
        size = self.num_rows * self._num_columns * 8 + self.num_chunks * 12
        self._image = torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        table = self._views(self._image)
        pointers = [[tensor.data_ptr() for tensor in row] for row in rows]
        table.rows[:, :-2] = torch.tensor(pointers, dtype=torch.int64)
        table.rows[:, -2] = numels
        table.rows[:, -1] = torch.tensor(ordinals, dtype=torch.int64)
        row = torch.repeat_interleave(torch.arange(self.num_rows), per_row)
        first = per_row.cumsum(0) - per_row
        table.chunk_row.copy_(row)
        table.chunk_offset.copy_((torch.arange(self.num_chunks) - first[row]) * chunk_numel)

    def upload(self) -> LaunchTable:
        """The table on the tensors' device; the copy does not wait for the GPU."""
        if self.device.type == "cpu":
            return self._views(self._image)
        if torch.cuda.is_current_stream_capturing() and not self._captured:
            self._captured = True
            _IMAGES_OF_GRAPHS.append(self._image)
        buffer = torch.empty_like(self._image, device=self.device)
        return self._views(buffer.copy_(self._image, non_blocking=True))

    def _views(self, buffer: torch.Tensor) -> LaunchTable:
        end_of_rows = self.num_rows * self._num_columns * 8
        end_of_offsets = end_of_rows + self.num_chunks * 8
        return LaunchTable(
            buffer[:end_of_rows].view(torch.int64).view(-1, self._num_columns),
            buffer[end_of_rows:end_of_offsets].view(torch.int64),
            buffer[end_of_offsets:].view(torch.int32),
            self.num_chunks,
            buffer,
        )


class BoundKernel:
    """A Triton kernel with its grid and constants, launched past Triton's dispatch, which takes longer than the launch.

    The first call compiles and launches as usual. All later calls must give arguments of the same types, pointers as
    well aligned as the first time, and no integers but those that the kernel does not specialize.

    Args:
        kernel: Its constants are its last arguments.
        num_programs: Of the grid.
        constants: All its constants by name, and options such as `num_warps`.
    """

    def __init__(self, kernel: Any, num_programs: int, **constants: Any) -> None:
        self._kernel, self._grid, self._options = kernel, (num_programs, 1, 1), constants
        self._constants: tuple[Any, ...] = ()
        self._launch: Callable[..., None] | None = None

    @property
    def takes_addresses(self) -> bool:
        """Whether tensors may be given by their addresses; the dispatch of the first call needs their dtypes."""
        return self._launch is not None

    def __call__(self, *arguments: Any) -> None:
        """Launch on the current stream."""
        if self._launch is not None:
            self._launch(*arguments, *self._constants)
            return
        compiled = self._kernel[self._grid](*arguments, **self._options)
        if compiled is not None and TAKES_CONSTANTS:
            self._constants = tuple(self._options[name] for name in self._kernel.arg_names if name in self._options)
            self._launch = compiled[self._grid]


def _takes_constants() -> bool:
    """Whether a compiled kernel of this Triton is called with its constants, as that of 3.6 is."""
    try:
        from triton import __version__
    except ImportError:
        return False
    return tuple(map(int, __version__.split(".")[:2])) >= (3, 6)


TAKES_CONSTANTS = _takes_constants()

_IMAGES_OF_GRAPHS: list[torch.Tensor] = []
"""Images that a CUDA graph reads at every replay; kept, because nothing tells when the graph dies."""


def is_aligned(*tensors: torch.Tensor) -> bool:
    """Whether every tensor begins at a multiple of 16 bytes, as vector loads need."""
    together = 0
    for tensor in tensors:
        together |= tensor.data_ptr()
    return together % _ALIGNMENT_BYTES == 0
