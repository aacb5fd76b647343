"""Which elements of a tensor share a second moment: the planner's partition, made addressable.

A tensor is seen as a matrix of neurons (`output_axes`) by what each of them weighs (the other axes). Neurons fall into
periods of `num_grouped` heads, each a block of `head_dim` neurons, followed by `num_single` heads whose neurons are
blocks of their own:

    rows                     head_dim 1, 1 grouped, 0 single        (every period is one neuron)
    heads                    1 grouped, 0 single
    queries, keys, values    one period: all queries and keys grouped, all values single
    interleaved              a period a key head: its queries and itself grouped, its value single
    whole tensor             one head of all neurons

Blocks are numbered in the order of the neurons. Biases (`element`) keep a second moment for each element instead.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from optplan.planner.tensors import HeadLayout, Parameter

BlockKind = Literal["element", "row", "head", "fused_qkv", "tensor"]

_BY_ROW = frozenset({
    "token_embedding", "position_embedding", "output_head", "value", "attention_output", "mlp", "router",
    "patch_embedding",
})  # fmt: skip


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


class Blocks(msgspec.Struct, frozen=True):
    """The blocks of one tensor.

    Attributes:
        kind: As the planner names it: `element`, `row`, `head`, `fused_qkv` or `tensor`.
        shape: Of the tensor.
        output_axes: Axes that index the neurons.
        head_dim: Neurons of one head.
        num_grouped: Heads of a period that are one block each.
        num_single: Heads of a period whose neurons are one block each.
        num_blocks: Second moments of the whole tensor.
    """

    kind: BlockKind
    shape: tuple[int, ...]
    output_axes: tuple[int, ...]
    head_dim: int
    num_grouped: int
    num_single: int
    num_blocks: int

    @property
    def num_neurons(self) -> int:
        """Neurons of the tensor."""
        return math.prod(self.shape[axis] for axis in self.output_axes)

    @property
    def fan_in(self) -> int:
        """Elements of one neuron."""
        return math.prod(size for axis, size in enumerate(self.shape) if axis not in self.output_axes)

    @property
    def neurons_per_period(self) -> int:
        """Neurons of one period."""
        return (self.num_grouped + self.num_single) * self.head_dim

    @property
    def blocks_per_period(self) -> int:
        """Blocks of one period."""
        return self.num_grouped + self.num_single * self.head_dim

    @property
    def num_periods(self) -> int:
        """Periods of the tensor."""
        return self.num_neurons // max(self.neurons_per_period, 1)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of the second moments."""
        return self.shape if self.kind == "element" else (self.num_blocks,)


def blocks_of(parameter: Parameter) -> Blocks:
    """The blocks of a parameter, as many as the planner counts.

    Raises:
        ValueError: The heads do not account for every output neuron.
    """
    kind = partition(parameter)
    head_dim, num_grouped, num_single = _period(parameter, kind.kind)
    # One block for all needs no neurons; any axis gives the same.
    axes = parameter.output_axes if kind.kind in ("row", "head", "fused_qkv") else tuple(range(len(parameter.shape)))
    blocks = Blocks(kind.kind, parameter.shape, axes, head_dim, num_grouped, num_single, kind.num_blocks)
    covered = blocks.num_periods * blocks.neurons_per_period, blocks.num_periods * blocks.blocks_per_period
    if kind.kind not in ("element", "tensor") and covered != (blocks.num_neurons, blocks.num_blocks):
        raise ValueError(
            f"the heads of '{parameter.name}' must cover its {parameter.num_output_neurons} output neurons, "
            f"got {parameter.heads}"
        )
    return blocks


def _period(parameter: Parameter, kind: BlockKind) -> tuple[int, int, int]:
    """Neurons of a head, heads that are one block each, and heads whose neurons are."""
    heads = parameter.heads
    if kind == "head" and heads is not None:
        return heads.head_dim, 1, 0
    if kind == "fused_qkv" and heads is not None:
        num_periods = heads.num_key_heads if heads.interleaved else 1
        grouped = (heads.num_query_heads + heads.num_key_heads) // num_periods
        return heads.head_dim, grouped, heads.num_value_heads // num_periods
    return (parameter.numel if kind == "tensor" else 1), 1, 0
