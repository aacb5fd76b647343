"""How a step of our Adam-mini is cut into programs, and so what it allocates: one rule for the kernels and the planner.

A tensor falls into pieces, each served by one kind of launch:

    elements   second moments for every element: one pass
    rows       blocks of at most `ONE_PROGRAM_NUMEL` elements that lie together: one pass, whole blocks a program
    segments   larger blocks that lie together: partial sums of `ONE_PROGRAM_NUMEL` squares, their sum, the update
    columns    neurons that are columns of a row-major matrix: partial sums over tiles, their sum, the update

A launch of a kind serves the pieces of all tensors. Its table is int64: for each piece its pointers and sizes, for each
chunk (and each sum that follows the partial ones) the piece it belongs to and where it begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec

from optplan.planner.optimizers.adam_mini_blocks import Blocks

PieceKind = Literal["elements", "rows", "segments", "columns"]

ONE_PROGRAM_NUMEL = 16_384
"""Elements that one program holds at once: a block up to here needs one pass."""
ROW_CHUNK_NUMEL = 65_536
"""Elements that one entry of the table stands for where blocks need one pass."""
ELEMENT_CHUNK_NUMEL = 1_024
COLUMN_TILE = 128
"""Rows and columns of the tile that one program sums in the column launch."""
PIECE_WORDS = 14
"""int64 words of a piece in the table: four pointers, six sizes, the tensor's place in the launch and in the optimizer,
its first element, the place of its sums where ranks share blocks."""
CHUNK_WORDS = 2
SEGMENT_WORDS = 4

_WORD_BYTES, _FP32_BYTES = 8, 4


class Piece(msgspec.Struct, frozen=True):
    """Part of a tensor that one kind of launch serves.

    Attributes:
        kind: Which launch.
        offset: First element in the tensor.
        block_offset: First second moment in the tensor's.
        num_blocks: Second moments of the piece (elements for `elements`).
        block_numel: Elements of one block; 1 for `elements`; the rows of the matrix for `columns`.
        head_dim: For `columns`, neurons that one program of the second launch sums.
        num_grouped: For `columns`, heads of a period that are one block each.
        num_single: For `columns`, heads of a period whose neurons are.
        num_columns: For `columns`, neurons of the piece.
    """

    kind: PieceKind
    offset: int
    block_offset: int
    num_blocks: int
    block_numel: int
    head_dim: int = 1
    num_grouped: int = 0
    num_single: int = 0
    num_columns: int = 0

    @property
    def chunks_per_block(self) -> int:
        """Partial sums of one block of a segment."""
        return -(-self.block_numel // ONE_PROGRAM_NUMEL)

    @property
    def rows_per_chunk(self) -> int:
        """Blocks that one entry of the table stands for, in a launch of rows."""
        return max(1, ROW_CHUNK_NUMEL // self.block_numel)

    @property
    def num_tile_rows(self) -> int:
        """Partial sums of one column."""
        return -(-self.block_numel // COLUMN_TILE)

    @property
    def num_chunks(self) -> int:
        """Entries of the first launch."""
        if self.kind == "elements":
            return -(-self.num_blocks // ELEMENT_CHUNK_NUMEL)
        if self.kind == "rows":
            return -(-self.num_blocks // self.rows_per_chunk)
        if self.kind == "segments":
            return self.num_blocks * self.chunks_per_block
        return self.num_tile_rows * -(-self.num_columns // COLUMN_TILE)

    @property
    def num_sums(self) -> int:
        """Programs of the second launch, which sums what the first left."""
        if self.kind == "segments":
            return self.num_blocks
        return -(-self.num_columns // self.head_dim)

    @property
    def num_partials(self) -> int:
        """fp32 partial sums."""
        return {"segments": self.num_chunks, "columns": self.num_tile_rows * self.num_columns}.get(self.kind, 0)

    @property
    def num_words(self) -> int:
        """int64 words of the table."""
        sums = self.num_sums * (SEGMENT_WORDS if self.kind == "segments" else CHUNK_WORDS)
        return PIECE_WORDS + self.num_chunks * CHUNK_WORDS + sums


def table_bytes(blocks: Blocks) -> int:
    """Bytes of a tensor's part of the launch table."""
    return sum(piece.num_words for piece in pieces(blocks)) * _WORD_BYTES


def partial_sum_bytes(blocks: Blocks) -> int:
    """Bytes of the fp32 partial sums for the blocks of a tensor that several programs sum together."""
    return sum(piece.num_partials for piece in pieces(blocks)) * _FP32_BYTES


def pieces(blocks: Blocks) -> Iterator[Piece]:
    """The pieces of a tensor, in the order of its blocks."""
    if blocks.kind == "element":
        yield Piece("elements", 0, 0, blocks.num_neurons * blocks.fan_in, 1)
    elif blocks.output_axes == tuple(range(len(blocks.output_axes))):
        yield from runs(blocks)
    else:
        yield from _columns(blocks)


def runs(blocks: Blocks) -> Iterator[Piece]:
    """Blocks of one size that lie one after another: the grouped heads of each period, then its single neurons."""
    head_numel = blocks.head_dim * blocks.fan_in
    if not blocks.num_single:
        yield _run(0, 0, blocks.num_periods * blocks.num_grouped, head_numel)
        return
    num_single = blocks.num_single * blocks.head_dim
    for period in range(blocks.num_periods):
        offset, first = period * blocks.neurons_per_period * blocks.fan_in, period * blocks.blocks_per_period
        yield _run(offset, first, blocks.num_grouped, head_numel)
        yield _run(offset + blocks.num_grouped * head_numel, first + blocks.num_grouped, num_single, blocks.fan_in)


def _run(offset: int, block_offset: int, num_blocks: int, block_numel: int) -> Piece:
    kind: PieceKind = "rows" if block_numel <= ONE_PROGRAM_NUMEL else "segments"
    return Piece(kind, offset, block_offset, num_blocks, block_numel)


def _columns(blocks: Blocks) -> Iterator[Piece]:
    """Neurons on the last axis: one matrix `[in, out]` for each index of the axes before."""
    *_, num_rows, num_columns = blocks.shape
    heads = (blocks.head_dim, blocks.num_grouped, blocks.num_single)
    if blocks.kind == "row":
        heads = (COLUMN_TILE, 0, 1)  # blocks are columns whatever the head; a tile of them is summed at once
    per_matrix = blocks.num_blocks * num_columns // blocks.num_neurons
    for matrix in range(blocks.num_neurons // num_columns):
        yield Piece(
            "columns", matrix * num_rows * num_columns, matrix * per_matrix, per_matrix, num_rows, *heads, num_columns
        )
