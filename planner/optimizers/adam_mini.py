"""Adam-mini as our kernels keep it: one second moment a block, the blocks taken from the model's structure.

Blocks (Zhang et al., ICLR 2025, arXiv 2406.16793, Algorithm 3): embeddings and the output head by row, query and key
by head, value, attention output and feed-forward by output neuron, everything else whole. Where the paper is silent:
biases keep Adam's elementwise second moment, as in the authors' code; a fused query-key-value matrix divides like its
parts; stacked experts divide by expert and output neuron; routers and patch embeddings, linear maps too, by output
neuron.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from optplan.planner.dtypes import Dtype
from optplan.planner.optimizers.adam_mini_blocks import BlockKind, blocks_of, partition
from optplan.planner.optimizers.adam_mini_work import partial_sum_bytes, table_bytes
from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel
from optplan.planner.optimizers.parts import like_parameter, step_counter, tensor
from optplan.planner.optimizers.scratch import Scratch
from optplan.planner.tensors import Parameter, StateTensor
from optplan.planner.timeline import TimelineBuilder

_WHY: dict[BlockKind, str] = {
    "element": "one an element",
    "row": "one a row",
    "head": "one a head",
    "fused_qkv": "one a query or key head, one a value row",
    "tensor": "one for the tensor",
}


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
        """The launch table, and the partial sums of squares of blocks that several programs sum together."""
        del context
        scratch, blocks = Scratch(timeline), [blocks_of(parameter) for parameter in parameters if parameter.numel]
        table = scratch.alloc("all tensors", ("launch table", sum(map(table_bytes, blocks))))
        sums = scratch.alloc("all tensors", ("partial sums of squares", sum(map(partial_sum_bytes, blocks))))
        scratch.free(sums, table)
