"""What `step()` allocates on one rank of parameters whose rows are dealt out.

Row by row, an optimizer works on its rows as on parameters of their own. What ours exchange with other ranks comes on
top: MicroAdam gathers the gradients of the tensors whose blocks it cannot cut, Adapprox adds up what runs down the
columns, Adam-mini sums of shared blocks.

Source: `optim_impls/sharding.py` (`GatheredBatch`), `optim_impls/adapprox/sharded.py` and `sharded_launcher.py`,
`optim_impls/adam_mini/shared_blocks.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from optplan.planner.optimizers.adam_mini_blocks import blocks_of
from optplan.planner.optimizers.adapprox import Adapprox, matrix_shape
from optplan.planner.optimizers.adapprox_layout import MAX_KERNEL_RANK, MatrixLayout, matrix_table_bytes, waves
from optplan.planner.optimizers.adapprox_rows import write_rows_step
from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel, itemsize
from optplan.planner.optimizers.scratch import Scratch
from optplan.planner.sharding.optimizer_state import has_whole_blocks, shares_blocks
from optplan.planner.sharding.shards import RowShard
from optplan.planner.tensors import Parameter
from optplan.planner.timeline import TimelineBuilder
from optplan.planner.units import round_up

_ALIGNED_NUMEL = 16
_FP32_BYTES = 4


def write_sharded_step(
    timeline: TimelineBuilder,
    optimizer: OptimizerModel,
    parameters: Sequence[Parameter],
    context: OptimizerContext,
    shard: RowShard,
) -> None:
    """Append the allocations and frees of one steady `step()` on this rank's rows."""
    local = [shard.local(parameter) for parameter in parameters]
    if optimizer.id == "micro-adam":
        _write_micro_adam(timeline, optimizer, parameters, context, shard)
    elif isinstance(optimizer, Adapprox):
        _write_adapprox(Scratch(timeline), optimizer, parameters, context, shard)
    elif optimizer.id == "adam-mini":
        _write_adam_mini(timeline, optimizer, parameters, context, shard)
    else:
        optimizer.write_step(timeline, local, context)


def _write_micro_adam(
    timeline: TimelineBuilder,
    optimizer: OptimizerModel,
    parameters: Sequence[Parameter],
    context: OptimizerContext,
    shard: RowShard,
) -> None:
    """Tensors of whole blocks in one launch, then the gathered ones: all at once, as one collective brings them."""
    block = optimizer.options["block"]
    own = [p for p in parameters if has_whole_blocks(p, shard, block=block)]
    apart = [p for p in parameters if not has_whole_blocks(p, shard, block=block)]
    if own:
        optimizer.write_step(timeline, [shard.local(p) for p in own], context)
    if not apart:
        return
    scratch, who = Scratch(timeline), "all gathered tensors"
    width = sum(map(shard.padded_numel, apart)) * itemsize(context.gradient_dtype)
    sent = scratch.alloc(who, ("gradients sent", width))
    received = scratch.alloc(who, ("gradients received", width * shard.num_ranks))
    numel = sum(round_up(p.numel, _ALIGNED_NUMEL) for p in apart)
    gradients = scratch.alloc(who, ("whole gradients", numel * itemsize(context.gradient_dtype)))
    scratch.free(received, sent)
    whole = scratch.alloc(who, ("whole parameters", numel * itemsize(context.parameter_dtype)))
    optimizer.write_step(timeline, apart, context)
    scratch.free(whole, gradients)


def _write_adam_mini(
    timeline: TimelineBuilder,
    optimizer: OptimizerModel,
    parameters: Sequence[Parameter],
    context: OptimizerContext,
    shard: RowShard,
) -> None:
    """The launch on a rank's rows, and the sums of shared blocks: every rank's, and what they become."""
    shared = [p for p in parameters if shares_blocks(p, shard)]
    size = sum(blocks_of(p).num_blocks for p in shared) * _FP32_BYTES
    scratch, who = Scratch(timeline), "shared blocks"
    sums = [scratch.alloc(who, ("sums of squares", size))] * bool(size)
    # A layout of heads holds for whole tensors alone, so these are taken whole: the tables are small.
    local = [p if p.heads is not None else shard.local(p) for p in parameters]
    optimizer.write_step(timeline, local, context)
    if size:
        ranks = [scratch.alloc(who, ("sums of a rank", size)) for _ in range(shard.num_ranks)]
        scratch.free(scratch.alloc(who, ("total", size)), *ranks)
    scratch.free(*sums)


def _write_adapprox(
    scratch: Scratch,
    optimizer: Adapprox,
    parameters: Sequence[Parameter],
    context: OptimizerContext,
    shard: RowShard,
) -> None:
    """Rounds of matrices that every rank divides alike, then the vectors; ranks above the kernels' each at once."""
    matrices = [p for p in parameters if matrix_shape(p) is not None]
    layouts = [_layout(optimizer, p, p) for p in matrices]
    kernels = [p for p, layout in zip(matrices, layouts, strict=True) if layout.rank <= MAX_KERNEL_RANK]
    for places in waves([_layout(optimizer, p, p) for p in kernels]):
        wave = [_layout(optimizer, kernels[place], shard.local(kernels[place])) for place in places]
        _write_wave(scratch, [layout for layout in wave if layout.rows], wave)
    for rank in dict.fromkeys(layout.rank for layout in layouts if layout.rank > MAX_KERNEL_RANK):
        large = [p for p, layout in zip(matrices, layouts, strict=True) if layout.rank == rank]
        converted = context.gradient_dtype != "float32"
        write_rows_step(scratch, [_layout(optimizer, p, shard.local(p)) for p in large], converted=converted)
    vectors = sum(shard.local(p).numel for p in parameters if matrix_shape(p) is None) * _FP32_BYTES
    if vectors:
        parts = ("gradients in fp32", "divisors", "moves")
        scratch.free(*[scratch.alloc("vectors", (part, vectors)) for part in parts])


def _layout(optimizer: Adapprox, whole: Parameter, rows: Parameter) -> MatrixLayout:
    shape = matrix_shape(whole)
    assert shape is not None
    return MatrixLayout(rows.shape[0], shape[1], optimizer.rank(whole))


def _write_wave(scratch: Scratch, present: Sequence[MatrixLayout], wave: Sequence[MatrixLayout]) -> None:
    who = "a round of matrices"
    table = scratch.alloc(who, ("launch table", matrix_table_bytes(present)))
    sums = scratch.alloc(
        who, ("sketches, partial sums and Gram matrices", sum(layout.scratch_bytes() for layout in present))
    )
    factors = sum(layout.columns * layout.rank for layout in wave) * _FP32_BYTES
    scratch.free(scratch.alloc(who, ("U added up over the ranks", factors)))
    scratch.free(table, sums)
