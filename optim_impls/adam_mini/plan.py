"""The launches of one batch of tensors, and the table that tells their programs what to do.

The pieces of every tensor (`optplan.planner.optimizers.adam_mini_work`) are gathered by launch; the table is one int64
array whose host image is kept for as long as no tensor moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from optplan.optim_impls.adam_mini.layout import Layout
from optplan.optim_impls.launch import BoundKernel
from optplan.optim_impls.optimizer_base import Member, local_tensor
from optplan.planner.optimizers.adam_mini_work import ELEMENT_CHUNK_NUMEL, ONE_PROGRAM_NUMEL, Piece, PieceKind

_IMAGES_OF_GRAPHS: list[torch.Tensor] = []
"""Images that a CUDA graph reads at every replay; kept, because nothing tells when the graph dies."""
_VECTOR_NUMEL = 16
"""Offsets that are multiples of it keep every load of a tensor that begins at 16 bytes whole."""


class LaunchKey(NamedTuple):
    """What is constant within a launch: its kind, whether its loads are whole vectors, elements of a block for rows.

    Attributes:
        kind: Of the pieces.
        aligned: Whether loads are whole vectors.
        block_numel: Elements of a block, for rows.
        shared: Whether other ranks hold parts of the blocks.
    """

    kind: PieceKind
    aligned: bool
    block_numel: int
    shared: bool


class Placed(NamedTuple):
    """A piece of a tensor.

    Attributes:
        piece: The piece.
        pointers: Parameter, gradient and both moments at the piece.
        places: Words 10 to 13 of its row: the tensor's place in the batch and in the optimizer, the piece's first
            element in the whole tensor, its first sum where ranks share blocks.
    """

    piece: Piece
    pointers: tuple[int, int, int, int]
    places: tuple[int, int, int, int]


class Launch(NamedTuple):
    """One launch, or the three of a kind with partial sums.

    Attributes:
        key: What is constant in it.
        pieces_at: Word of the table where its pieces begin.
        chunks_at: Word where its chunks begin.
        sums_at: Word where the entries of the second launch begin.
        partials_at: Its first partial sum.
        num_chunks: Chunks.
        num_sums: Entries of the second launch.
        max_head_dim: The widest head, for columns.
    """

    key: LaunchKey
    pieces_at: int
    chunks_at: int
    sums_at: int
    partials_at: int
    num_chunks: int
    num_sums: int
    max_head_dim: int


class Plan:
    """Launches and table of a batch. It holds no gradient, so `zero_grad` frees their memory.

    Args:
        members: Of the batch.
        layouts: Of the members.
        aligned: Whether every tensor begins at 16 bytes.
        sums_at: Of each member, where the sums over its shared blocks begin in the buffer for all.

    Attributes:
        device: Where the members are.
        dtypes: Of parameter, gradient and first moment.
        states: The members' states.
        launches: In the order they run; they are independent of each other.
        num_partials: fp32 partial sums that all launches need together.
        bound: The launches' kernels with their constants.
    """

    def __init__(
        self, members: Sequence[Member], layouts: Sequence[Layout], *, aligned: bool, sums_at: Sequence[int]
    ) -> None:
        first = members[0]
        self.device = first.parameter.device
        self.dtypes = (first.parameter.dtype, first.gradient.dtype, local_tensor(first.state["exp_avg"]).dtype)
        self.states = [member.state for member in members]
        self.bound: dict[tuple[Any, ...], BoundKernel] = {}
        self._captured = False
        self._words: list[torch.Tensor] = []
        self._num_words = self.num_partials = 0
        gathered: dict[LaunchKey, list[Placed]] = {}
        for place, (member, layout) in enumerate(zip(members, layouts, strict=True)):
            for piece in layout.pieces():
                places = (place, member.ordinal, layout.first + piece.offset, sums_at[place] + piece.block_offset)
                placed = Placed(piece, _pointers(member, piece), places)
                gathered.setdefault(_key(piece, aligned=aligned, shared=layout.shared), []).append(placed)
        # The largest first: while it runs, the host prepares the others.
        order = sorted(gathered, key=lambda key: (-sum(map(_numel, gathered[key])), key))
        self.launches = [self._launch(key, gathered[key]) for key in order]
        self._image = torch.empty(self._num_words, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        torch.cat(self._words, out=self._image)
        self._words = []

    def upload(self) -> torch.Tensor:
        """The table on the device, int64; the copy does not wait for the GPU."""
        if self.device.type == "cpu":
            return self._image
        if torch.cuda.is_current_stream_capturing() and not self._captured:
            self._captured = True
            _IMAGES_OF_GRAPHS.append(self._image)
        return torch.empty_like(self._image, device=self.device).copy_(self._image, non_blocking=True)

    def _launch(self, key: LaunchKey, placed: list[Placed]) -> Launch:
        first_partial = self.num_partials
        rows = [self._piece_row(key, one) for one in placed]
        pieces_at = self._append(torch.tensor(rows))
        chunks = torch.cat([_chunks(number, one.piece) for number, one in enumerate(placed)])
        chunks_at = self._append(chunks)
        sums = _sums(key, placed)
        sums_at = self._append(sums)
        widest = max(one.piece.head_dim for one in placed)
        return Launch(key, pieces_at, chunks_at, sums_at, first_partial, len(chunks), len(sums), widest)

    def _piece_row(self, key: LaunchKey, placed: Placed) -> list[int]:
        """Words of a piece: pointers, sizes as the kernels of its kind read them, its places."""
        piece = placed.piece
        sizes = [piece.num_blocks if key.kind in ("elements", "rows") else piece.block_numel]
        sizes += [piece.num_columns, self.num_partials, piece.head_dim, piece.num_grouped, piece.num_single]
        self.num_partials += piece.num_partials
        return [*placed.pointers, *sizes, *placed.places]

    def _append(self, words: torch.Tensor) -> int:
        at = self._num_words
        self._words.append(words.flatten())
        self._num_words += words.numel()
        return at


def _numel(placed: Placed) -> int:
    return placed.piece.num_blocks * placed.piece.block_numel


def _key(piece: Piece, *, aligned: bool, shared: bool) -> LaunchKey:
    width = piece.num_columns if piece.kind == "columns" else piece.block_numel
    whole = aligned and piece.offset % _VECTOR_NUMEL == 0 and width % _VECTOR_NUMEL == 0
    return LaunchKey(piece.kind, whole, piece.block_numel if piece.kind == "rows" else 0, shared)


def _pointers(member: Member, piece: Piece) -> tuple[int, int, int, int]:
    first, second = (local_tensor(member.state[name]) for name in ("exp_avg", "exp_avg_sq"))
    parameter, gradient, moment = (
        tensor.data_ptr() + piece.offset * tensor.element_size()
        for tensor in (member.parameter, member.gradient, first)
    )
    return parameter, gradient, moment, second.data_ptr() + piece.block_offset * second.element_size()


def _chunks(number: int, piece: Piece) -> torch.Tensor:
    """Piece and beginning of each chunk, int64 [chunks, 2]: an element, a row, or a tile of columns."""
    index = torch.arange(piece.num_chunks)
    if piece.kind == "elements":
        begin = index * ELEMENT_CHUNK_NUMEL
    elif piece.kind == "rows":
        begin = index * piece.rows_per_chunk
    elif piece.kind == "segments":
        block = index.div(piece.chunks_per_block, rounding_mode="floor")
        begin = block * piece.block_numel + (index - block * piece.chunks_per_block) * ONE_PROGRAM_NUMEL
    else:
        begin = index
    return torch.stack([torch.full_like(begin, number), begin], dim=1)


def _sums(key: LaunchKey, placed: list[Placed]) -> torch.Tensor:
    """Entries of the second launch: first chunk, chunks, piece and block of a segment; piece and head of columns."""
    entries, first_chunk = [torch.empty(0, dtype=torch.int64)], 0
    for number, one in enumerate(placed):
        index = torch.arange(one.piece.num_sums)
        columns = [torch.full_like(index, number), index]
        if key.kind == "segments":
            per_block = one.piece.chunks_per_block
            columns = [first_chunk + index * per_block, torch.full_like(index, per_block), *columns]
            first_chunk += one.piece.num_chunks
        if key.kind in ("segments", "columns"):
            entries.append(torch.stack(columns, dim=1))
    return torch.cat(entries) if len(entries) == 1 else torch.cat(entries[1:])
