"""Attention with a learned bias for each distance, as T5 has it: its making, and the unfused kernel that takes it.

Source: transformers `T5Attention.compute_bias` and `create_position_bias_mask`; pytorch
`native/transformers/attention.cpp` (`_scaled_dot_product_attention_math`), the only kernel for a bias with a gradient.
"""

from __future__ import annotations

from optplan.planner.step.attention import AttentionShape, by_head, safe_softmax
from optplan.planner.step.graph import Tensor
from optplan.planner.step.operations import cast, dropout, scale
from optplan.planner.step.positions import position_ids
from optplan.planner.step.projections import batched_product, clone
from optplan.planner.step.tape import Tape
from optplan.planner.step.vocabulary import embedding


def position_bias(t: Tape, seq: int, buckets: int, heads: int, *, is_causal: bool) -> Tensor:
    """The bias `[1, heads, seq, seq]` of each query and key by the bucket of their distance."""
    path = t.path
    asking = position_ids(t, seq)
    t.path = path
    keys = t.new(seq, "int64", "positions")
    distances = t.new(seq * seq, "int64", "distances")
    bucket = _buckets(t, seq * seq, is_causal=is_causal)
    bias = embedding(t, seq * seq, buckets, heads, [bucket], is_transposed=True)
    del bucket, distances, asking, keys
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
    del chosen, large, far, near
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


def causal_bias(t: Tape, bias: Tensor, seq: int) -> Tensor:
    """The bias where a key is not after the query, the lowest number elsewhere."""
    asking, keys = t.new(seq, "int64", "positions"), t.new(seq, "int64", "positions")
    visible = t.new(seq * seq, "bool", "keys not after the query")
    del asking, keys
    numel, dtype = bias.numel, bias.dtype

    def backward(_: list[Tensor]) -> list[Tensor]:
        zero = t.new(1, dtype, "zero")
        gradient = t.new(numel, dtype, "gradient")
        del zero
        return [gradient]

    node = t.node([bias], backward, [visible])
    lowest = t.new(1, dtype, "lowest number")
    out = t.new(numel, dtype, "causal bias")
    del lowest
    out.node = node
    return out


def biased_attention(
    t: Tape, qkv: tuple[Tensor, Tensor, Tensor], shape: AttentionShape, bias: Tensor, *, drop: float
) -> Tensor:
    """Attention written out in fp32 with `bias` added to the scores: the result with its heads joined."""
    bias = cast(t, bias, t.autocast or bias.dtype)
    q, k, v = (cast(t, x, t.autocast or x.dtype) for x in qkv)
    dtype = q.dtype
    if shape.batch > 1:
        node = t.node([k], lambda gradients: [gradients[0].view(permuted=True)])
        k = Tensor(k.storage, k.numel, k.dtype, node)
    wide_q, wide_k, wide_v = (cast(t, x, "float32") for x in (q, k, v))
    scaled = scale(t, wide_q, "scaled queries")
    keys = scale(t, wide_k, "scaled keys")
    left, right = by_head(t, scaled, shape, "queries"), by_head(t, keys, shape, "keys")
    scores = batched_product(t, left, right, shape.num_scores, "attention scores")
    del left, right, keys
    added = t.node([scores, bias], lambda gradients: [gradients[0], gradients[0]])
    scores = Tensor(scores.storage, scores.numel, "float32", added)
    weights = safe_softmax(t, scores, shape)
    del scores
    weights = dropout(t, weights, drop)
    returned = t.new(shape.num_scores if dtype != "float32" else 0, dtype, f"attention weights in {dtype}")
    values = by_head(t, wide_v, shape, "values")
    joined = shape.heads > 1 and shape.batch > 1
    out = batched_product(t, weights, values, shape.numel, "attention output by head", joined=joined)
    del values
    result = cast(t, out, dtype)
    del returned, wide_q, wide_k, wide_v, scaled, out, weights, bias
    return clone(t, result, "attention output")
