"""What ranks of tensor parallelism exchange: sums over their parts, and with sequence parallelism parts of the tokens.

Without sequence parallelism every rank has all tokens between the blocks: what a block puts out is added up over the
ranks, and so is the gradient of what it took. With it a rank has its share of the tokens there: they are gathered
before a block and what it puts out is added up and dealt out again. torch's collectives write into new memory.

Source: Korthikanti et al. 2022, arXiv 2205.05198; torch `distributed/_functional_collectives.py` (`all_reduce`,
`all_gather_tensor`, `reduce_scatter_tensor`).
"""

from __future__ import annotations

from optplan.planner.step.graph import LAST, Node, Tensor
from optplan.planner.step.options import StepOptions
from optplan.planner.step.tape import Tape


def enter_block(t: Tape, x: Tensor, options: StepOptions) -> Tensor:
    """What a block's projections take: all tokens; backward adds up over the ranks what each finds."""
    if options.tensor_parallel == 1:
        return x
    numel, dtype = x.numel, x.dtype
    node = t.node([x], lambda _: [t.new(numel, dtype, "gradient added up over the ranks")])
    if not options.sequence_parallel:
        return Tensor(x.storage, numel, dtype, node, 0, x.permuted)
    out = t.new(numel * options.tensor_parallel, dtype, "tokens of all ranks")
    out.node = node
    return out


def leave_block(t: Tape, x: Tensor, options: StepOptions) -> Tensor:
    """What a block puts out, added up over the ranks; with sequence parallelism this rank's tokens of it."""
    if options.tensor_parallel == 1:
        return x
    numel, dtype = x.numel, x.dtype
    if not options.sequence_parallel:
        node = t.node([x], lambda gradients: [gradients[0]])
        out = t.new(numel, dtype, "output added up over the ranks")
    else:
        node = t.node([x], lambda _: [t.new(numel, dtype, "gradient of all tokens")])
        out = t.new(numel // options.tensor_parallel, dtype, "output added up, this rank's tokens")
    out.node = node
    return out


def received(t: Tape, numel: int, options: StepOptions) -> Tensor:
    """What an earlier stage of a pipeline has sent; its gradient is let go when it has been sent back."""
    t.path = "pipeline"
    share = options.tensor_parallel if options.sequence_parallel else 1
    node = Node(LAST, lambda _: (), 1)
    out = t.new(numel // share, t.autocast or t.parameter_dtype, "hidden states received")
    out.node = node
    return out
