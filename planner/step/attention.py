"""Attention between the projections: which kernel runs, what it allocates and what it keeps.

Source: pytorch `aten/src/ATen/native/transformers/cuda/sdp_utils.cpp` (choice of the backend), `attention.cu`,
`native/transformers/attention.cpp` (`_scaled_dot_product_attention_math`); transformers
`integrations/sdpa_attention.py` and the `eager_attention_forward` of the models.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from optplan.planner.dtypes import ITEMSIZE_BYTES, Dtype
from optplan.planner.step import kernels
from optplan.planner.step.graph import Tensor
from optplan.planner.step.operations import add, add_constant, cast, dropout, pointwise, promote, scale, softmax
from optplan.planner.step.options import StepOptions
from optplan.planner.step.projections import batched_product, clone, expanded
from optplan.planner.step.tape import Tape
from optplan.planner.units import round_up

Backend = Literal["cudnn", "flash", "efficient", "math"]
WIDEST_FUSED_HEAD = 256
"""Widest head of the flash and cuDNN kernels, and of grouped heads that transformers leaves to the kernel."""

_ROW, _GRADIENT_ROW = 8, 16
"""Elements to a multiple of which the efficient kernel wants the rows of a bias, and makes those of its gradient."""
_PARTS = ("queries", "keys", "values")


class AttentionShape(msgspec.Struct, frozen=True):
    """The sizes of one attention.

    Attributes:
        batch: Sequences.
        seq: Tokens a sequence.
        heads: Query heads.
        kv_heads: Key and value heads.
        width: Elements of one head.
        is_causal: Whether a token sees none that comes after it, where no mask says what it sees.
    """

    batch: int
    seq: int
    heads: int
    kv_heads: int
    width: int
    is_causal: bool = True

    @property
    def numel(self) -> int:
        """Elements of the queries, and of the result."""
        return self.batch * self.seq * self.heads * self.width

    @property
    def num_scores(self) -> int:
        """Elements of the attention weights."""
        return self.batch * self.heads * self.seq * self.seq

    @property
    def comes_joined(self) -> bool:
        """Whether the gradient of the heads' results comes with the heads joined, so that a product must copy it."""
        return self.heads > 1 and self.batch > 1 and self.seq > 1

    @property
    def copies(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads


def choose_backend(dtype: Dtype, shape: AttentionShape, *, masked: bool, capability: tuple[int, int]) -> Backend:
    """The kernel that `F.scaled_dot_product_attention` runs in training.

    Args:
        dtype: Dtype of queries, keys and values.
        shape: Sizes; with grouped heads only where they reach the kernel as they are.
        masked: Whether an explicit mask is given.
        capability: Compute capability of the GPU.
    """
    ampere = capability >= (8, 0)
    half = dtype != "float32" and shape.width <= WIDEST_FUSED_HEAD and shape.width % 8 == 0
    if half and shape.seq > 1 and capability in ((9, 0), (10, 0), (10, 3)):
        return "cudnn"
    if half and ampere and not masked:
        return "flash"
    if shape.kv_heads != shape.heads or (dtype == "bfloat16" and not ampere):
        return "math"
    return "efficient"


def attend(
    t: Tape,
    options: StepOptions,
    qkv: tuple[Tensor, Tensor, Tensor],
    shape: AttentionShape,
    mask: Tensor | None,
    *,
    drop: float = 0.0,
    capped: bool = False,
    upcast: bool = True,
    casts_back: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention as the model's configuration asks for it: the result with its heads joined, and eager's weights.

    Args:
        t: The tape.
        options: How the step is run.
        qkv: Queries, keys and values.
        shape: Sizes; keys and values have `kv_heads` heads.
        mask: What `masks` made: booleans, or numbers for eager attention.
        drop: Probability with which an attention weight is dropped.
        capped: Whether eager attention caps the scores by a tanh first.
        upcast: Whether eager attention asks for its softmax in fp32.
        casts_back: Whether it casts the softmax to the dtype of the values.
    """
    if options.attention == "eager":
        return eager(t, qkv, shape, mask, drop=drop, capped=capped, upcast=upcast, casts_back=casts_back)
    q, k, v = qkv
    del qkv
    if options.attention == "flash":
        return sdpa(t, (q, k, v), shape, "flash", drops=drop > 0), None
    if shape.copies > 1 and (mask is not None or shape.width > WIDEST_FUSED_HEAD):
        k, v = repeat_kv(t, k, shape, "keys"), repeat_kv(t, v, shape, "values")
        shape = msgspec.structs.replace(shape, kv_heads=shape.heads)
    dtype = t.autocast or q.dtype
    backend = choose_backend(dtype, shape, masked=mask is not None, capability=options.compute_capability)
    return sdpa(t, (q, k, v), shape, backend, mask=mask, drops=drop > 0), None


def sdpa(
    t: Tape,
    qkv: tuple[Tensor, Tensor, Tensor],
    shape: AttentionShape,
    backend: Backend,
    *,
    mask: Tensor | None = None,
    added: Tensor | None = None,
    drops: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention`: the result with its heads joined, `[batch, seq, heads * width]`.

    Args:
        t: The tape.
        qkv: Queries, keys and values.
        shape: Sizes; keys and values have `kv_heads` heads.
        backend: The kernel, as `choose_backend` says.
        mask: Boolean mask, for kernels that take one.
        added: Numbers without gradient that are added to the scores, instead of a mask.
        drops: Whether attention weights are dropped out.
    """
    q, k, v = qkv
    if t.autocast is not None:
        v, k, q = (cast(t, x, t.autocast) for x in (v, k, q))
    del qkv
    if backend == "math":
        if mask is not None:
            added = _bias(t, shape, q.dtype, padded=False)
        return _math(t, (q, k, v), shape, added, drops=drops)
    return _fused(t, q, k, v, shape, backend, mask, added)


def _fused(
    t: Tape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: AttentionShape,
    backend: Backend,
    mask: Tensor | None,
    added: Tensor | None,
) -> Tensor:
    dtype, inputs = q.dtype, (q, k, v)
    layouts = [(x.numel, x.permuted) for x in inputs]
    bias = [] if mask is None else [_bias(t, shape, dtype, padded=backend == "efficient")]
    if added is not None:
        bias = [_padded(t, cast(t, added, dtype), shape) if backend == "efficient" else cast(t, added, dtype)]
        if added.node is not None and added.numel < shape.num_scores:
            bias = [expanded(t, bias[0], shape.batch)]
    learned = [x for x in bias if x.node is not None]
    num_learned = len(learned)

    def backward(_: list[Tensor]) -> list[Tensor]:
        gradients = [
            t.new(numel, dtype, f"gradient of the {part}", permuted=permuted)
            for (numel, permuted), part in zip(layouts, _PARTS, strict=True)
        ]
        gradients += [_bias_gradient(t, shape, dtype) for _ in range(num_learned)]
        _backward_scratch(t, shape, backend, ITEMSIZE_BYTES[dtype])
        return gradients

    node = t.node([*inputs, *learned], backward, [*bias, k, q, v])
    seeds = [t.new(1, "int64", "random state", "workspace") for _ in range(2)] if backend == "cudnn" else []
    out = t.new(shape.numel, dtype, "attention output", permuted=q.permuted and backend != "efficient")
    rows = round_up(shape.seq, 32) if backend == "efficient" else shape.seq
    # The efficient kernel and cuDNN leave the log-sums out where no graph will ask for them.
    num_sums = shape.batch * shape.heads * rows if t.keeps_graph or backend == "flash" else 0
    log_sums = t.new(num_sums, "float32", "attention log-sums")
    if backend == "cudnn":
        t.scratch(256, operation="attention workspace")
    if backend == "flash":
        seeds = [t.new(count, "int64", "random state", "workspace") for count in (2, 1)]
    out.node = node
    t.save(node, [log_sums, out, *reversed(seeds)])
    del log_sums
    return out


def _bias(t: Tape, shape: AttentionShape, dtype: Dtype, *, padded: bool) -> Tensor:
    """The boolean mask as numbers added to the scores; the efficient kernel wants rows of a multiple of 8 elements."""
    constants = [t.new(1, dtype, "mask constant", "workspace") for _ in range(2)]
    bias = t.new(shape.batch * shape.seq * shape.seq, dtype, "attention mask as numbers")
    while constants:
        constants.pop()
    if not padded or shape.seq % _ROW == 0:
        return bias
    return t.new(shape.batch * shape.seq * round_up(shape.seq, _ROW), dtype, "padded attention mask")


def _padded(t: Tape, added: Tensor, shape: AttentionShape) -> Tensor:
    """Numbers to add, each row of a multiple of 8 elements, of which the last are cut off again."""
    if shape.seq % _ROW == 0:
        return added
    numel, dtype = added.numel, added.dtype
    whole = numel // shape.seq * round_up(shape.seq, _ROW)
    if added.node is None:
        return t.new(whole, dtype, "padded bias")
    pad = t.node([added], lambda _: [t.new(numel, dtype, "gradient of the bias")])
    out = t.new(whole, dtype, "padded bias")
    out.node = pad
    cut = t.node([out], lambda _: [t.new(whole, dtype, "gradient among zeros")])
    return Tensor(out.storage, numel, dtype, cut)


def _bias_gradient(t: Tape, shape: AttentionShape, dtype: Dtype) -> Tensor:
    """The gradient of numbers that were added, in each sequence its own; each row has a multiple of 16 elements."""
    rows = shape.num_scores // shape.seq
    whole = t.new(rows * round_up(shape.seq, _GRADIENT_ROW), dtype, "gradient of the bias")
    return Tensor(whole.storage, shape.num_scores, dtype, None, 0, False, True)


def _backward_scratch(t: Tape, shape: AttentionShape, backend: Backend, itemsize: int) -> None:
    sizes = (shape.batch, shape.heads, shape.kv_heads, shape.seq, shape.width)
    if backend == "cudnn":
        t.scratch(kernels.cudnn_backward_scratch(*sizes), operation="attention backward")
    elif backend == "flash":
        t.scratch(*kernels.flash_backward_scratch(*sizes), operation="attention backward")
    else:
        _efficient_backward_scratch(t, shape, itemsize)


def _efficient_backward_scratch(t: Tape, shape: AttentionShape, itemsize: int) -> None:
    num_rows = shape.batch * shape.heads * shape.seq
    if itemsize == 4:
        product = t.new(shape.numel, "float32", "gradient times output", "workspace")
        row_sums = t.new(num_rows, "float32", "row sums", "workspace")
        delta = t.new(num_rows, "float32", "row sums by head", "workspace")
        del row_sums, product
    else:
        delta = t.new(num_rows, "float32", "row sums by head", "workspace")
    sizes = (shape.batch, shape.heads, shape.seq, shape.width)
    num_bytes = kernels.efficient_backward_scratch(*sizes, itemsize=itemsize)
    workspace = t.storage(num_bytes, "attention backward", "workspace")
    del delta, workspace


def _math(
    t: Tape, qkv: tuple[Tensor, Tensor, Tensor], shape: AttentionShape, added: Tensor | None, *, drops: bool
) -> Tensor:
    """The unfused attention, in fp32, that remains where no kernel applies; it keeps what it needs to its end."""
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
    return join_heads(t, result, shape)


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
    if bias is not None:
        weights = add(t, weights, bias, "attention scores with bias")
    if mask is not None:
        weights = add_constant(t, weights, promote(weights.dtype, mask.dtype), "masked attention scores")
    if upcast:
        weights = cast(t, softmax(t, cast(t, weights, "float32"), "attention weights in float32"), q.dtype)
    else:
        weights = softmax(t, cast(t, weights, "float32") if t.autocast else weights, "attention weights")
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
    return batched_product(t, cast_weights, right, shape.numel, "attention output by head", joined=joined)


def join_heads(t: Tape, x: Tensor, shape: AttentionShape) -> Tensor:
    """The heads' results put together for each token: a copy, unless there is one token."""
    return clone(t, x, "attention output") if shape.seq > 1 else x


def _lies_by_head(x: Tensor, as_cast: Tensor, shape: AttentionShape) -> bool:
    """Whether keys or values lie head by head: those written out for each head, and views that a cast wrote out."""
    return shape.copies > 1 and (shape.kv_heads > 1 or as_cast is not x)
