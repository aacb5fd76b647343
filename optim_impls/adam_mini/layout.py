"""Which blocks a rank holds of a tensor whose rows are dealt out, and how a rank's part falls into pieces.

Where every rank's rows are whole blocks, and as many as a sharded vector of second moments gives it, a rank needs
nothing of the others. All other blocks are shared: each rank sums over its part and keeps all second moments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import msgspec
import torch

from optplan.optim_impls.fingerprint import local_tensor
from optplan.optim_impls.sharding import RowShards, row_shards
from optplan.planner.optimizers.adam_mini_blocks import Blocks
from optplan.planner.optimizers.adam_mini_work import Piece, pieces, runs


class Layout(NamedTuple):
    """The blocks of a tensor as one rank sees them.

    Attributes:
        blocks: Of this rank's part, or of the whole tensor where ranks share blocks.
        shards: How rows are dealt out; None where every rank holds the whole tensor.
        shared: Whether ranks share blocks.
    """

    blocks: Blocks
    shards: RowShards | None = None
    shared: bool = False

    @property
    def first(self) -> int:
        """This rank's first element in the whole tensor."""
        return 0 if self.shards is None else self.shards.elements.start

    @property
    def rows(self) -> slice:
        """This rank's rows of the whole tensor; of a tensor that is not dealt out, all."""
        if self.shards is None:
            return slice(None)
        elements, columns = self.shards.elements, max(self.shards.columns, 1)
        return slice(elements.start // columns, elements.stop // columns)

    def pieces(self) -> Iterator[Piece]:
        """The pieces of this rank's part; of shared blocks, with their numbers in the whole tensor."""
        if self.shards is None or not self.shared:
            return pieces(self.blocks)
        if 0 not in self.blocks.output_axes:
            return pieces(_with_rows(self.blocks, self.rows))
        if self.blocks.output_axes == tuple(range(len(self.blocks.output_axes))):
            return _cut_runs(self.blocks, self.shards.elements)
        return _matrices(self.blocks, self.rows)


def layout_of(parameter: torch.Tensor, blocks: Blocks) -> Layout:
    """How the blocks of a parameter lie on this rank.

    Raises:
        ValueError: A DTensor is divided otherwise than by rows.
    """
    shards = row_shards(parameter, optimizer="AdamMini")
    if shards is None:
        return Layout(blocks)
    if shards.num_ranks == 1:
        return Layout(blocks, shards)
    if blocks.kind == "element" or _ranks_hold_whole_blocks(blocks, shards):
        local = Layout(blocks, shards)
        return local._replace(blocks=_with_rows(blocks, local.rows))
    return Layout(blocks, shards, shared=True)


def new_second_moments(parameter: torch.Tensor, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    """Zeros; of a DTensor a DTensor, sharded like it where a rank needs nothing of the others, else on every rank."""
    local = local_tensor(parameter)
    if local is parameter or layout.blocks.kind == "element":
        return (
            torch.zeros_like(parameter, dtype=dtype)
            if layout.blocks.kind == "element"
            else _zeros(local, layout, dtype)
        )
    if layout.shards is not None and not layout.shared:
        return layout.shards.join(_zeros(local, layout, dtype), _num_blocks_of_all(layout))
    # A build of torch without distributed training can run everything else.
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(_zeros(local, layout, dtype), mesh, [Replicate()] * mesh.ndim, run_check=False)


def _zeros(local: torch.Tensor, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(layout.blocks.state_shape, dtype=dtype, device=local.device)


def _num_blocks_of_all(layout: Layout) -> int:
    """Blocks of the whole tensor, of which this rank holds some."""
    assert layout.shards is not None
    if layout.shards.num_ranks == 1:
        return layout.blocks.num_blocks
    whole = msgspec.structs.replace(layout.blocks, shape=layout.shards.shape)
    return whole.num_neurons // layout.blocks.head_dim


def _ranks_hold_whole_blocks(blocks: Blocks, shards: RowShards) -> bool:
    """Whether blocks are as large as each other, and each rank's rows are as many of them as torch deals out."""
    if 0 not in blocks.output_axes or blocks.num_single or blocks.num_grouped != 1 or not blocks.num_neurons:
        return False
    neurons = shards.rows_per_rank * (blocks.num_neurons // shards.shape[0])
    return neurons == -(-blocks.num_blocks // shards.num_ranks) * blocks.head_dim


def _with_rows(blocks: Blocks, rows: slice) -> Blocks:
    """The blocks of some rows of the tensor."""
    shape = (rows.stop - rows.start, *blocks.shape[1:])
    local = msgspec.structs.replace(blocks, shape=shape)
    if blocks.kind == "element":
        return msgspec.structs.replace(local, num_blocks=math.prod(shape))
    return msgspec.structs.replace(local, num_blocks=local.num_periods * local.blocks_per_period)


def _cut_runs(blocks: Blocks, elements: slice) -> Iterator[Piece]:
    """Pieces of the elements that lie in `elements`: of each run its first cut block, its whole ones, its last."""
    for run in runs(blocks):
        begin = max(run.offset, elements.start)
        end = min(run.offset + run.num_blocks * run.block_numel, elements.stop)
        while begin < end:
            block, into = divmod(begin - run.offset, run.block_numel)
            count = 1 if into else max(1, (end - begin) // run.block_numel)
            numel = min(end - begin, run.block_numel - into)
            yield Piece("segments", begin - elements.start, run.block_offset + block, count, numel)
            begin += count * numel


def _matrices(blocks: Blocks, rows: slice) -> Iterator[Piece]:
    """Pieces of stacked matrices whose neurons are columns."""
    local = _with_rows(blocks, rows)
    before = rows.start * (blocks.num_blocks // blocks.shape[0])
    for piece in pieces(local):
        yield msgspec.structs.replace(piece, block_offset=piece.block_offset + before)
