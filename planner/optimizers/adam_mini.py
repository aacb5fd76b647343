"""Adam-mini as our kernels keep it: one second moment a block, the blocks taken from the model's structure.

Blocks (Zhang et al., ICLR 2025, arXiv 2406.16793, Algorithm 3): embeddings and the output head by row, query and key
by head, value, attention output and feed-forward by output neuron, everything else whole. Where the paper is silent:
biases keep Adam's elementwise second moment, as in the authors' code; a fused query-key-value matrix divides like its
parts; stacked experts divide by expert and output neuron; routers and patch embeddings, linear maps too, by output
neuron.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import msgspec

from optplan.planner.dtypes import Dtype
from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel
from optplan.planner.optimizers.launch import write_launch_table
from optplan.planner.optimizers.parts import like_parameter, step_counter, tensor
from optplan.planner.optimizers.scratch import Scratch
from optplan.planner.tensors import HeadLayout, Parameter, StateTensor
from optplan.planner.timeline import TimelineBuilder

BlockKind = Literal["element", "row", "head", "fused_qkv", "tensor"]

SUM_CHUNK_NUMEL = 16_384
"""Elements whose squares one program sums when a block is larger than a row."""

_FP32_BYTES = 4
_BY_ROW = frozenset({
    "token_embedding", "position_embedding", "output_head", "value", "attention_output", "mlp", "router",
    "patch_embedding",
})  # fmt: skip
_WHY: dict[BlockKind, str] = {
    "element": "one an element",
    "row": "one a row",
    "head": "one a head",
    "fused_qkv": "one a query or key head, one a value row",
    "tensor": "one for the tensor",
}


class Partition(msgspec.Struct, frozen=True):
    """How a parameter divides into blocks that share a second moment.

    Attributes:
        kind: `element`; `row` (an output neuron, a token); `head`; `fused_qkv` (heads of the query and key part, rows
            of the value part); `tensor`.
        num_blocks: How many second moments it keeps.
    """

    kind: BlockKind
    num_blocks: int


def partition(parameter: Parameter) -> Partition:
    """The blocks of a parameter, from its role, heads and output axes."""
    heads = parameter.heads
    if parameter.role == "bias":
        return Partition("element", parameter.numel)
    if parameter.role in ("query", "key") and heads is not None:
        return Partition("head", heads.num_query_heads + heads.num_key_heads)
    if parameter.role == "fused_qkv" and heads is not None:
        return Partition("fused_qkv", _num_summed_heads(heads) + heads.num_value_heads * heads.head_dim)
    if parameter.role in _BY_ROW:
        return Partition("row", parameter.num_output_neurons)
    return Partition("tensor", 1)


def _num_summed_heads(heads: HeadLayout) -> int:
    return heads.num_query_heads + heads.num_key_heads


class AdamMini(OptimizerModel):
    """Our Adam-mini: a first moment like the parameter, the blocks' second moments always in fp32 (they are few)."""

    STATE_DTYPES: ClassVar[tuple[Dtype, ...]] = ("float32", "bfloat16")

    def state(self, parameter: Parameter, context: OptimizerContext) -> tuple[StateTensor, ...]:
        """Step counter, first moment, and a second moment a block."""
        blocks = partition(parameter)
        shape = parameter.shape if blocks.kind == "element" else (blocks.num_blocks,)
        return (
            step_counter("cpu"),
            like_parameter("exp_avg", parameter, self.state_dtype(context)),
            tensor("exp_avg_sq", shape, "float32", why=_WHY[blocks.kind]),
        )

    def write_step(self, timeline: TimelineBuilder, parameters: Sequence[Parameter], context: OptimizerContext) -> None:
        """The launch table, and the partial sums of squares of blocks larger than a row."""
        del context
        table = write_launch_table(timeline, parameters, num_lists=4)
        scratch, size = Scratch(timeline), sum(map(partial_sum_bytes, parameters))
        sums = scratch.alloc("all tensors", ("partial sums of squares", size))
        scratch.free(sums, table)


def partial_sum_bytes(parameter: Parameter) -> int:
    """Bytes of the fp32 partial sums `[blocks, chunks]` for blocks that several programs sum together."""
    blocks = partition(parameter)
    if blocks.kind in ("element", "row"):
        return 0
    if blocks.kind == "fused_qkv" and parameter.heads is not None:
        num_blocks = _num_summed_heads(parameter.heads)
        block_numel = parameter.numel // parameter.num_output_neurons * parameter.heads.head_dim
    else:
        num_blocks, block_numel = blocks.num_blocks, parameter.numel // blocks.num_blocks
    return num_blocks * -(-block_numel // SUM_CHUNK_NUMEL) * _FP32_BYTES
