"""What an optimizer keeps on one rank of parameters whose rows are dealt out.

Most optimizers treat a rank's rows as a parameter of its own. Ours keep the structure of the whole tensor:

    adam-mini    second moments of a rank's own blocks where its rows are whole blocks, else of all blocks on every rank
    micro-adam   a rank's part where all ranks hold as many rows and these are whole blocks, else all on every rank
    adapprox     the rows of Q, all of U on every rank; the rank follows from the whole matrix

torchao decides by a rank's own elements whether a tensor is large enough to be quantized.

Source: the classes of `optim_impls`; torchao 0.18 `optim/adam.py` (`_new_buffer`); torch 2.13 `optim/adamw.py`, whose
`zeros_like` of a DTensor has the shard's size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from optplan.planner.errors import ConfigError
from optplan.planner.optimizers.adam_mini_blocks import blocks_of
from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel
from optplan.planner.sharding.shards import RowShard
from optplan.planner.tensors import Parameter, StateTensor

_ROW_BY_ROW = {
    ("adamw", "fused"), ("adamw", "foreach"), ("adamw", "for-loop"), ("adamw", "optplan"),
    ("sgd", "fused"), ("sgd", "foreach"), ("sgd", "for-loop"),
    ("adamw-8bit", "torchao"), ("adamw-4bit", "torchao"), ("adamw-fp8", "torchao"),
}  # fmt: skip
"""Optimizers for which rows are a parameter like any other."""
_FP32_BYTES = 4
_WHOLE_TENSORS = {("adam-mini", "optplan"), ("micro-adam", "optplan"), ("adapprox", "optplan")}
"""Those that keep the structure of the whole tensor."""


def check_takes_shards(optimizer: OptimizerModel, *, flag: str, flat: bool = False) -> None:
    """Refuse an optimizer whose work on a part of a tensor is not described.

    Args:
        optimizer: The optimizer.
        flag: What of the command line hands it parts.
        flat: Whether the parts know nothing of whole rows.

    Raises:
        ConfigError: It is none of those described.
    """
    if optimizer.options.get("mode") == "paper":
        raise ConfigError(f"adapprox with mode=paper takes whole tensors, not parts, as {flag} hands it; use mode=fast")
    known = _ROW_BY_ROW if flat else _ROW_BY_ROW | _WHOLE_TENSORS
    if (optimizer.id, optimizer.implementation) in known:
        return
    what = "pieces of tensors" if flat else "rows of parameters"
    raise ConfigError(
        f"{optimizer.id} with implementation={optimizer.implementation} is not modelled on {what}, as {flag} "
        "hands it; --sharding ddp and zero1 take every optimizer"
    )


def shard_state(
    optimizer: OptimizerModel, parameter: Parameter, context: OptimizerContext, shard: RowShard
) -> tuple[StateTensor, ...]:
    """The state tensors that one rank keeps for its rows of a parameter."""
    local = shard.local(parameter)
    if optimizer.id == "adam-mini":
        return _with_second_moments(optimizer, parameter, context, shard)
    if optimizer.id == "micro-adam":
        takes_part = has_whole_blocks(parameter, shard, block=optimizer.options["block"])
        return optimizer.state(local if takes_part else parameter, context)
    if optimizer.id == "adapprox":
        return tuple(_of_rows(t, parameter, local) for t in optimizer.state(parameter, context))
    return optimizer.state(local, context)


def kept_beside_state(
    optimizer: OptimizerModel, parameters: Sequence[Parameter], shard: RowShard | None
) -> list[tuple[str, int]]:
    """Name and bytes of what an optimizer keeps on one rank's device from its first step on, without saving it.

    On whole tensors that is nothing. Adam-mini knows how many elements each of the blocks has that ranks share, in fp32
    (`SharedBlocks`).
    """
    if shard is None or (optimizer.id, optimizer.implementation) != ("adam-mini", "optplan"):
        return []
    num_blocks = sum(blocks_of(parameter).num_blocks for parameter in parameters if shares_blocks(parameter, shard))
    return [("elements of shared blocks", _FP32_BYTES * num_blocks)] if num_blocks else []


def has_whole_blocks(parameter: Parameter, shard: RowShard, *, block: int) -> bool:
    """Whether every rank holds as many rows, and these are whole blocks of MicroAdam."""
    columns = math.prod(parameter.shape[1:])
    return shard.is_even(parameter) and shard.rows_per_rank(parameter) * columns % block == 0


def shares_blocks(parameter: Parameter, shard: RowShard) -> bool:
    """Whether ranks hold parts of the same blocks of Adam-mini."""
    blocks = blocks_of(parameter)
    if blocks.kind == "element" or shard.num_ranks == 1:
        return False
    if 0 not in blocks.output_axes or blocks.num_single or blocks.num_grouped != 1 or not blocks.num_neurons:
        return True
    neurons = shard.rows_per_rank(parameter) * (blocks.num_neurons // parameter.shape[0])
    return neurons != -(-blocks.num_blocks // shard.num_ranks) * blocks.head_dim


def _with_second_moments(
    optimizer: OptimizerModel, parameter: Parameter, context: OptimizerContext, shard: RowShard
) -> tuple[StateTensor, ...]:
    """Adam-mini's state: the first moment of the rows, second moments of their blocks or of all."""
    local = shard.local(parameter)
    step, first, second = optimizer.state(parameter, context)
    moment = _of_rows(first, parameter, local)
    if second.shape == parameter.shape and blocks_of(parameter).kind == "element":
        return step, moment, _of_rows(second, parameter, local)
    if shares_blocks(parameter, shard):
        return step, moment, second
    blocks = blocks_of(parameter)
    neurons = local.num_output_neurons
    num_blocks = neurons // blocks.head_dim
    return step, moment, _resized(second, (num_blocks,))


def _of_rows(tensor: StateTensor, parameter: Parameter, local: Parameter) -> StateTensor:
    """What of a state tensor belongs to the rows: a part where it has a row for each, all of it otherwise."""
    if tensor.name == "u_factor" or tensor.name == "step":
        return tensor
    if parameter.shape and tensor.shape[:1] == parameter.shape[:1]:
        return _resized(tensor, (*local.shape[:1], *tensor.shape[1:]))
    return tensor


def _resized(tensor: StateTensor, shape: tuple[int, ...]) -> StateTensor:
    sizes = " x ".join(map(str, shape)) or "1"
    formula = f"{sizes} of {tensor.formula}"
    return msgspec.structs.replace(tensor, shape=shape, formula=formula)
