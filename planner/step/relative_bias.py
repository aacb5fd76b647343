"""What T5 adds to its attention's scores: a learned bias for each distance, and zeros where it has learned none.

Source: transformers `T5Attention.compute_bias` and `create_position_bias_mask`.
"""

from __future__ import annotations

from optplan.planner.dtypes import Dtype
from optplan.planner.step.attention_shape import AttentionShape
from optplan.planner.step.graph import LAST, Node, Tensor
from optplan.planner.step.positions import position_ids
from optplan.planner.step.tape import Tape
from optplan.planner.step.vocabulary import embedding


def position_bias(t: Tape, seq: int, buckets: int, heads: int, *, is_causal: bool) -> Tensor:
    """The bias `[1, heads, seq, seq]` of each query and key by the bucket of their distance.

    The heads of a pair lie together, so that its rows are read in steps.
    """
    path = t.path
    asking = position_ids(t, seq)
    t.path = path
    keys = t.new(seq, "int64", "positions")
    distances = t.new(seq * seq, "int64", "distances")
    bucket = _buckets(t, seq * seq, is_causal=is_causal)
    bias = embedding(t, seq * seq, buckets, heads, [bucket], is_transposed=True)
    del asking, keys, distances, bucket
    return Tensor(bias.storage, bias.numel, bias.dtype, bias.node if t.keeps_graph else None, 0, heads > 1)


def zero_bias(t: Tape, shape: AttentionShape, dtype: Dtype, *, asks_gradient: bool) -> Tensor:
    """The bias of an attention that has learned none; where layers are recomputed it asks for a gradient too."""
    bias = t.new(shape.heads * shape.seq**2, dtype, "bias of zeros")
    if not asks_gradient:
        return bias
    # The graph holds on to the zeros and to their gradient, to its own end.
    held = [bias.storage]

    def keep(gradients: list[Tensor]) -> tuple[()]:
        held.insert(0, gradients[0].storage)
        return ()

    bias.node = Node(LAST, keep, 1)
    return bias


def _buckets(t: Tape, count: int, *, is_causal: bool) -> Tensor:
    """The bucket of each distance: one each for the near ones, wider and wider ones for the far."""
    total = None
    if is_causal:
        zeros = t.new(count, "int64", "zeros")
        least = t.new(count, "int64", "distances back")
        del zeros
        far = t.new(count, "int64", "distances back")
        del least
    else:
        ahead = t.new(count, "bool", "keys ahead")
        number = t.new(count, "int64", "keys ahead")
        del ahead
        half = t.new(count, "int64", "first bucket")
        del number
        total = t.new(count, "int64", "bucket")
        del half
        far = t.new(count, "int64", "distances")
    near = t.new(count, "bool", "near ones")
    large = _far_buckets(t, count)
    chosen = t.new(count, "int64", "bucket")
    if total is None:
        total = t.new(count, "int64", "bucket")
    del chosen, far, near, large
    return total


def _far_buckets(t: Tape, count: int) -> Tensor:
    value = t.new(count, "float32", "distances")
    for operation in ("share of the nearest", "logarithm", "share of the widest", "bucket"):
        value = t.new(count, "float32", operation)
    whole = t.new(count, "int64", "bucket")
    del value
    shifted = t.new(count, "int64", "bucket")
    del whole
    last = t.new(count, "int64", "last bucket")
    result = t.new(count, "int64", "bucket")
    del last, shifted
    return result


def causal_bias(t: Tape, bias: Tensor, shape: AttentionShape) -> Tensor:
    """The bias where a key is not after the query, the lowest number elsewhere."""
    seq = shape.seq
    asking, keys = t.new(seq, "int64", "positions"), t.new(seq, "int64", "positions")
    visible = t.new(seq * seq, "bool", "keys not after the query")
    del asking, keys
    return _chosen(t, visible, bias, bias.numel)


def hidden_bias(t: Tape, bias: Tensor, mask: Tensor, shape: AttentionShape) -> Tensor:
    """The bias where `mask` lets a query see a key, in every sequence its own, the lowest number elsewhere."""
    return _chosen(t, mask, bias, shape.num_scores)


def _chosen(t: Tape, condition: Tensor, bias: Tensor, numel: int) -> Tensor:
    """`torch.where(condition, bias, lowest)` of `numel` elements."""
    dtype = bias.dtype

    def backward(_: list[Tensor]) -> list[Tensor]:
        zero = t.new(1, dtype, "zero")
        gradient = t.new(numel, dtype, "gradient")
        del zero
        return [gradient]

    asks = bias.node is not None and t.keeps_graph
    node = t.node([bias], backward, [condition]) if asks else None
    lowest = t.new(1, dtype, "lowest number")
    out = t.new(numel, dtype, "bias where visible")
    del lowest
    return Tensor(out.storage, numel, dtype, node, 0, bias.permuted)
