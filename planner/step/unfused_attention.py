"""Attention written out as products and a softmax: torch's fallback where no kernel applies, and the models' own.

Source: pytorch `native/transformers/attention.cpp` (`_scaled_dot_product_attention_math`); the
`eager_attention_forward` of transformers' models.
"""

from __future__ import annotations

from optplan.planner.step.attention_shape import AttentionShape
from optplan.planner.step.graph import Tensor
from optplan.planner.step.operations import (
    add,
    add_constant,
    cast,
    dropout,
    pointwise,
    promote,
    scale,
    softmax,
    wide_softmax,
)
from optplan.planner.step.projections import batched_product, clone, expanded
from optplan.planner.step.tape import Tape


def math_attention(
    t: Tape, qkv: tuple[Tensor, Tensor, Tensor], shape: AttentionShape, added: Tensor | None, *, drops: bool
) -> Tensor:
    """Torch's own attention without a fused kernel, in fp32, head by head; it keeps what it needs to its end.

    Args:
        t: The tape.
        qkv: Queries, keys and values.
        shape: Sizes; keys and values have `kv_heads` heads.
        added: Numbers that are added to the scores, if any; otherwise causal attention makes a mask.
        drops: Whether attention weights are dropped out.
    """
    dtype = qkv[0].dtype
    if added is not None:
        added = cast(t, added, t.autocast or added.dtype)
    wide_q, k, v = (cast(t, x, "float32") for x in qkv)
    del qkv
    q = scale(t, wide_q, "scaled queries")
    mask = _triangle(t, shape.seq) if added is None and shape.is_causal and shape.seq > 1 else added
    grouped = shape.copies > 1
    all_k = repeat_heads(t, k, shape, "keys") if grouped else k
    all_v = repeat_heads(t, v, shape, "values") if grouped else v
    scaled_k = scale(t, all_k, "scaled keys")
    left = by_head(t, q, shape, "queries")
    right = scaled_k if grouped else by_head(t, scaled_k, shape, "keys")
    scores = batched_product(t, left, right, shape.num_scores, "attention scores")
    del left, right, scaled_k
    weights = safe_softmax(t, _biased(t, scores, added), shape)
    del scores
    weights = dropout(t, weights, float(drops))
    returned = weights
    if dtype != "float32":
        returned = t.new(shape.num_scores, dtype, f"attention weights in {dtype}")
    right = all_v if grouped else by_head(t, all_v, shape, "values")
    out = batched_product(t, weights, right, shape.numel, "attention output by head", joined=shape.comes_joined)
    del right
    result = cast(t, out, dtype)
    del out, weights, all_v, all_k, q, mask, v, k, wide_q, returned, added
    return result


def _biased(t: Tape, scores: Tensor, bias: Tensor | None) -> Tensor:
    """The scores with `bias` added in place, as far as the graph is concerned."""
    if bias is None or bias.node is None:
        return scores
    node = t.node([scores, bias], lambda gradients: [gradients[0], gradients[0]])
    return Tensor(scores.storage, scores.numel, scores.dtype, node)


def _triangle(t: Tape, seq: int) -> Tensor:
    square = t.new(seq * seq, "bool", "causal mask")
    lower = t.new(seq * seq, "bool", "causal mask")
    del square
    constants = [t.new(1, "float32", "mask constant", "workspace") for _ in range(2)]
    mask = t.new(seq * seq, "float32", "causal mask as numbers")
    while constants:
        constants.pop()
    del lower
    return mask


def safe_softmax(t: Tape, scores: Tensor, shape: AttentionShape) -> Tensor:
    """A softmax that also looks for rows without a finite score."""
    weights = softmax(t, scores, operation="attention weights")
    rows = shape.num_scores // shape.seq
    empty = t.new(shape.num_scores, "bool", "search for empty rows", "workspace")
    empty_rows = t.new(rows, "bool", "search for empty rows", "workspace")
    zero = t.new(1, "float32", "search for empty rows", "workspace")
    del zero, empty_rows, empty
    return weights


def repeat_heads(t: Tape, x: Tensor, shape: AttentionShape, what: str) -> Tensor:
    """Keys or values with each head written out once for every query head that shares it."""
    return clone(t, x, f"repeated {what}", copies=shape.copies, permuted=shape.kv_heads > 1)


def repeat_kv(t: Tape, x: Tensor, shape: AttentionShape, what: str) -> Tensor:
    """The models' own repetition: like `repeat_heads`, but of a single head it makes a view."""
    if shape.kv_heads == 1 and shape.copies > 1:
        return expanded(t, x, shape.copies)
    return repeat_heads(t, x, shape, what) if shape.copies > 1 else x


def by_head(t: Tape, x: Tensor, shape: AttentionShape, what: str) -> Tensor:
    """A matrix product's operand with each head's elements together: a copy if they are not.

    Keys are copied transposed, and their gradient, transposed back, can be read with its heads joined.
    """
    if x.permuted or shape.heads == 1:
        return x
    if shape.batch == 1 or shape.seq == 1:
        # The heads of a single sequence, or of single tokens, need no copy to be read one by one.
        node = t.node([x], lambda gradients: [gradients[0].view(permuted=what != "keys")])
        return Tensor(x.storage, x.numel, x.dtype, node)
    return clone(t, x, f"{what} by head", permuted=what != "keys")


def eager(
    t: Tape,
    qkv: tuple[Tensor, Tensor, Tensor],
    shape: AttentionShape,
    mask: Tensor | None,
    *,
    drop: float = 0.0,
    capped: bool = False,
    upcast: bool = True,
    casts_back: bool = True,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The models' own attention, written out: the result with its heads joined, and the attention weights.

    Args:
        t: The tape.
        qkv: Queries, keys and values.
        shape: Sizes; keys and values have `kv_heads` heads.
        mask: What is added to the scores, if anything is.
        drop: Probability with which an attention weight is dropped.
        capped: Whether the scores are capped by a tanh first.
        upcast: Whether the softmax is asked for in fp32.
        casts_back: Whether the softmax is cast to the dtype of the values.
        bias: Numbers added to the scores before the mask, the same in every sequence.
    """
    q, k, v = qkv
    del qkv
    keys, values = repeat_kv(t, k, shape, "keys"), repeat_kv(t, v, shape, "values")
    weights = scale(t, scores(t, q, keys, shape), "scaled attention scores")
    if capped:
        weights = scale(t, weights, "scores over cap")
        weights = pointwise(t, weights, "tanh", saves_output=True)
        weights = scale(t, weights, "capped scores")
    if bias is not None and bias.node is not None:
        weights = add(t, weights, bias, "attention scores with bias")
    elif bias is not None:
        weights = add_constant(t, weights, promote(weights.dtype, bias.dtype), "attention scores with bias")
    if mask is not None:
        weights = add_constant(t, weights, promote(weights.dtype, mask.dtype), "masked attention scores")
    if upcast:
        weights = cast(t, wide_softmax(t, weights, "attention weights in float32"), q.dtype)
    else:
        weights = (wide_softmax if t.autocast else softmax)(t, weights, "attention weights")
        weights = cast(t, weights, v.dtype) if casts_back else weights
    weights = dropout(t, weights, drop)
    out = weighted_values(t, weights, values, shape)
    return join_heads(t, out, shape), weights


def scores(t: Tape, q: Tensor, k: Tensor, shape: AttentionShape) -> Tensor:
    """`torch.matmul(q, k.T)` with keys as `repeat_kv` leaves them."""
    cast_k = cast(t, k, t.autocast or k.dtype)
    cast_q = cast(t, q, t.autocast or q.dtype)
    left = by_head(t, cast_q, shape, "queries")
    right = cast_k if _lies_by_head(k, cast_k, shape) else by_head(t, cast_k, shape, "keys")
    return batched_product(t, left, right, shape.num_scores, "attention scores")


def weighted_values(t: Tape, weights: Tensor, v: Tensor, shape: AttentionShape) -> Tensor:
    """`torch.matmul(weights, v)` with values as `repeat_kv` leaves them."""
    cast_v = cast(t, v, t.autocast or v.dtype)
    cast_weights = cast(t, weights, t.autocast or weights.dtype)
    right = cast_v if _lies_by_head(v, cast_v, shape) else by_head(t, cast_v, shape, "values")
    joined = shape.comes_joined
    out = batched_product(t, cast_weights, right, shape.numel, "attention output by head", joined=joined)
    del right
    return out


def join_heads(t: Tape, x: Tensor, shape: AttentionShape) -> Tensor:
    """The heads' results put together for each token: a copy, unless there is one token."""
    return clone(t, x, "attention output") if shape.seq > 1 else x


def _lies_by_head(x: Tensor, as_cast: Tensor, shape: AttentionShape) -> bool:
    """Whether keys or values lie head by head: those written out for each head, and views that a cast wrote out."""
    return shape.copies > 1 and (shape.kv_heads > 1 or as_cast is not x)
