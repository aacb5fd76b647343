"""`F.scaled_dot_product_attention` as CUDA runs it: the kernel that would be chosen, and what precedes it.

Source: pytorch `aten/src/ATen/native/transformers/cuda/sdp_utils.cpp` (choice), `native/transformers/attention.cpp`
(`scaled_dot_product_attention`, `convert_boolean_attn_mask`, `pad_bias`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import msgspec
import torch
from torch.nn import functional as F

from optplan.planner.dtypes import Dtype
from optplan.planner.step.attention import HEAD_ALIGNMENT, Backend, choose_backend, takes_efficient
from optplan.planner.step.attention_shape import AttentionShape
from optplan.profilers.tracing.accumulation import overwriting_sums

aten = torch.ops.aten

_NUM_DIMS = 4
_BIAS_ALIGNMENT = 8
"""Elements to a multiple of which the memory-efficient kernel wants the rows of a mask padded."""


class Chooser:
    """Chooses the attention kernel as a GPU does, and remembers what it chose.

    Attributes:
        chosen: Every choice, in order.
    """

    def __init__(self, capability: tuple[int, int]) -> None:
        """Choose for a GPU of this compute capability."""
        self.chosen: list[Backend] = []
        self._capability = capability

    def choose(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        drops: bool = False,
    ) -> Backend:
        """The kernel for queries `[batch, heads, tokens, width]`, keys, values and a mask.

        Args:
            query: Queries.
            key: Keys.
            value: Values.
            mask: Booleans, or numbers that are added to the scores.
            drops: Whether attention weights are dropped out.
        """
        backend = self._by_sizes(query, key, value, mask, drops)
        self.chosen.append(backend)
        return backend

    def _by_sizes(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, drops: bool
    ) -> Backend:
        if query.dim() != _NUM_DIMS:
            return "math"
        batch, heads, seq, width = query.shape
        if mask is not None and mask.stride(-1) != 1:
            return "math"  # every fused kernel reads a mask row by row
        shape = AttentionShape(batch, seq, heads, key.shape[1], width)
        dtype = cast(Dtype, str(query.dtype).removeprefix("torch."))
        # One fused kernel makes the gradient of a bias, and takes values of another width than the keys.
        if value.shape[-1] != width or (mask is not None and mask.requires_grad):
            values = msgspec.structs.replace(shape, width=value.shape[-1])
            is_fit = all(takes_efficient(dtype, sizes, self._capability) for sizes in (shape, values))
            return "efficient" if is_fit else "math"
        return choose_backend(dtype, shape, masked=mask is not None, capability=self._capability, drops=drops)


def attend(
    chooser: Chooser,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    composing: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Any:
    """The attention's result, by the operations that CUDA would run.

    Args:
        chooser: Chooses the kernel.
        query: Queries `[batch, heads, tokens, width]`, and so on as for `F.scaled_dot_product_attention`.
        composing: Around the operations of the unfused attention.
    """
    backend = chooser.choose(query, key, value, attn_mask, drops=dropout_p > 0)
    if backend == "flash":
        return _flash(query, key, value, dropout_p, is_causal, scale)
    bias = _bias(attn_mask, query.dtype)
    if backend == "math":
        with overwriting_sums(), composing():
            return aten._scaled_dot_product_attention_math.default(
                query, key, value, bias, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
            )[0]
    keeps = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if backend == "cudnn":
        return aten._scaled_dot_product_cudnn_attention.default(
            query, key, value, bias, keeps, dropout_p, is_causal, False, scale=scale
        )[0]
    bias = _padded(bias, query, key)
    return aten._scaled_dot_product_efficient_attention.default(
        query, key, value, bias, keeps, dropout_p, is_causal, scale=scale
    )[0]


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """Flash attention; heads of an odd width are filled up for the kernel, and its result is cut again."""
    width = query.shape[-1]
    if width % HEAD_ALIGNMENT:
        query, key, value = (F.pad(x, (0, -width % HEAD_ALIGNMENT)) for x in (query, key, value))
        scale = width**-0.5 if scale is None else scale
    out = aten._scaled_dot_product_flash_attention.default(query, key, value, dropout_p, is_causal, False, scale=scale)[
        0
    ]
    return cast(torch.Tensor, out[..., :width] if width % HEAD_ALIGNMENT else out)


def _bias(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A boolean mask as numbers added to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    zero = torch.scalar_tensor(0.0, dtype=dtype, device=mask.device)
    lowest = torch.scalar_tensor(float("-inf"), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, lowest)


def _padded(bias: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """The bias with rows of a length that the kernel can load, for every head without copying."""
    if bias is None:
        return None
    length = bias.shape[-1]
    if length % _BIAS_ALIGNMENT:
        padded = F.pad(bias, (0, _BIAS_ALIGNMENT - length % _BIAS_ALIGNMENT))
        bias = padded[..., :length]
    return bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
