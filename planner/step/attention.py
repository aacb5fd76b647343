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
from optplan.planner.step.attention_shape import AttentionShape
from optplan.planner.step.graph import Tensor
from optplan.planner.step.operations import cast
from optplan.planner.step.options import StepOptions
from optplan.planner.step.projections import clone, expanded, transposed_keys
from optplan.planner.step.tape import Tape
from optplan.planner.step.unfused_attention import eager, join_heads, math_attention, repeat_kv
from optplan.planner.units import round_up

Backend = Literal["cudnn", "flash", "efficient", "math"]
WIDEST_FUSED_HEAD = 256
"""Widest head of the flash and cuDNN kernels, and of grouped heads that transformers leaves to the kernel."""
HEAD_ALIGNMENT = 8
"""Multiple of which a head must be wide for cuDNN; for flash attention torch fills narrower ones up to it."""
_WIDE_HEAD, _WIDER_HEAD = 192, 224
"""Heads up to the first, and from the second on without dropout, have a flash backward on every GPU."""

_ROW, _GRADIENT_ROW = 8, 16
"""Elements to a multiple of which the efficient kernel wants the rows of a bias, and makes those of its gradient."""
_PARTS = ("queries", "keys", "values")


def choose_backend(
    dtype: Dtype, shape: AttentionShape, *, masked: bool, capability: tuple[int, int], drops: bool = False
) -> Backend:
    """The kernel that `F.scaled_dot_product_attention` runs in training.

    Args:
        dtype: Dtype of queries, keys and values.
        shape: Sizes; with grouped heads only where they reach the kernel as they are.
        masked: Whether an explicit mask is given.
        capability: Compute capability of the GPU.
        drops: Whether attention weights are dropped out.
    """
    ampere = capability >= (8, 0)
    half = dtype != "float32" and shape.width <= WIDEST_FUSED_HEAD
    if half and shape.width % HEAD_ALIGNMENT == 0 and shape.seq > 1 and capability in ((9, 0), (10, 0), (10, 3)):
        return "cudnn"
    if half and ampere and not masked and not _is_beyond_flash(shape.width, drops, capability):
        return "flash"
    return "efficient" if takes_efficient(dtype, shape, capability) else "math"


def _is_beyond_flash(width: int, drops: bool, capability: tuple[int, int]) -> bool:
    """Whether flash attention has no backward for heads so wide on GPUs with little shared memory."""
    is_small = (8, 6) <= capability <= (8, 9) or (12, 0) <= capability <= (12, 1)
    return is_small and width > _WIDE_HEAD and (drops or width <= _WIDER_HEAD)


def takes_efficient(dtype: Dtype, shape: AttentionShape, capability: tuple[int, int]) -> bool:
    """Whether memory-efficient attention can run: every head its own keys, of 16 bytes where tensor cores load them."""
    if shape.kv_heads != shape.heads or (dtype == "bfloat16" and capability < (8, 0)):
        return False
    has_tensor_cores = capability >= (8, 0) or (capability >= (7, 0) and dtype != "float32")
    return not has_tensor_cores or shape.width * ITEMSIZE_BYTES[dtype] % 16 == 0


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
        return sdpa(t, (q, k, v), shape, "flash", drops=drop > 0, by_head=False), None
    is_repeated = shape.copies > 1 and (mask is not None or shape.width > WIDEST_FUSED_HEAD)
    lies_by_head = is_repeated and (shape.kv_heads > 1 or (t.autocast or q.dtype) != "float32")
    if is_repeated:
        k, v = repeat_kv(t, k, shape, "keys"), repeat_kv(t, v, shape, "values")
        shape = msgspec.structs.replace(shape, kv_heads=shape.heads)
    dtype = t.autocast or q.dtype
    capability, drops = options.compute_capability, drop > 0
    backend = choose_backend(dtype, shape, masked=mask is not None, capability=capability, drops=drops)
    if backend == "math" and lies_by_head:
        k, v = (Tensor(x.storage, x.numel, x.dtype, x.node, x.output, True) for x in (k, v))
    return sdpa(t, (q, k, v), shape, backend, mask=mask, drops=drops), None


def split_keys(t: Tape, x: Tensor, options: StepOptions, shape: AttentionShape, *, masked: bool = False) -> Tensor:
    """Keys right after their projection, split into heads; see `transposed_keys` for their gradient."""
    dtype, capability = t.autocast or x.dtype, options.compute_capability
    if options.attention == "sdpa":
        is_unfused = choose_backend(dtype, shape, masked=masked, capability=capability) == "math"
    else:
        is_unfused = options.attention == "eager"
    if is_unfused:
        return transposed_keys(t, x, options.batch_size, shape.seq)
    return x


def sdpa(
    t: Tape,
    qkv: tuple[Tensor, Tensor, Tensor],
    shape: AttentionShape,
    backend: Backend,
    *,
    mask: Tensor | None = None,
    added: Tensor | None = None,
    drops: bool = False,
    by_head: bool = True,
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
        by_head: Whether heads that are filled up for flash attention are laid out one after the other.
    """
    q, k, v = qkv
    if t.autocast is not None:
        v, k, q = (cast(t, x, t.autocast) for x in (v, k, q))
    del qkv
    if backend == "math":
        if mask is not None:
            added = _bias(t, shape, q.dtype, padded=False)
        out = math_attention(t, (q, k, v), shape, added, drops=drops)
        del q, k, v, added  # what autocast has cast, and the mask as numbers, end with the attention
        return join_heads(t, out, shape)
    if backend == "flash" and shape.width % HEAD_ALIGNMENT:
        out = _filled_flash(t, (q, k, v), shape, by_head=by_head)
        del q, k, v
        return clone(t, out, "attention output with its heads joined", permuted=True)
    return _fused(t, q, k, v, shape, backend, mask, added)


def _filled_flash(t: Tape, qkv: tuple[Tensor, Tensor, Tensor], shape: AttentionShape, *, by_head: bool) -> Tensor:
    """Flash attention of heads filled up to a multiple of 8 elements, of whose results the last are cut off again.

    Source: pytorch `native/transformers/attention.cpp` (`pad_last_dim`, `post_process_flash_output`), and before it
    flash-attention's `FlashAttnFunc`.
    """
    whole = msgspec.structs.replace(shape, width=round_up(shape.width, HEAD_ALIGNMENT))
    dtype, numel = qkv[0].dtype, whole.numel
    q, k, v = (_filled(t, x, whole.width * x.numel // shape.width, by_head) for x in qkv)
    del qkv
    out = _fused(t, q, k, v, whole, "flash", None, None)
    cut = t.node([out], lambda _: [t.new(numel, dtype, "gradient among zeros", permuted=by_head)])
    return Tensor(out.storage, shape.numel, dtype, cut)


def _filled(t: Tape, x: Tensor, whole: int, by_head: bool) -> Tensor:
    """Queries, keys or values in which each head has some zeros after it."""
    numel, dtype = x.numel, x.dtype
    node = t.node([x], lambda _: [t.new(numel, dtype, "gradient without the filling", permuted=by_head)])
    out = t.new(whole, dtype, "filled heads", permuted=by_head)
    out.node = node
    return out


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
    t.save(node, [log_sums, out, *(seeds if backend == "flash" else reversed(seeds))])
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
