"""Flash attention as the `flash_attn` package runs it inside a transformers model, without that package.

Source: transformers `integrations/flash_attention.py`; flash-attention's `flash_attn_interface.py`: queries, keys and
values come as `[batch, tokens, heads, width]`, and so does the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from optplan.planner.step.attention import HEAD_ALIGNMENT

NAME = "flash_attention_2"


@contextmanager
def played_flash_attention() -> Iterator[None]:
    """Within the context transformers models configured for flash attention run its kernel as torch has it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS[NAME] = _attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[NAME]  # type: ignore[no-untyped-call]


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention of one layer; windows, caps and padding are the kernel's business and take no memory."""
    del attention_mask
    if query.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    width = query.shape[-1]
    if width % HEAD_ALIGNMENT:
        query, key, value = (_filled(x) for x in (query, key, value))
    out = torch.ops.aten._scaled_dot_product_flash_attention.default(
        query, key, value, dropout, causal, False, scale=width**-0.5 if scaling is None else scaling
    )[0]
    out = out.transpose(1, 2)
    return out[..., :width].contiguous() if width % HEAD_ALIGNMENT else out, None


def _filled(x: torch.Tensor) -> torch.Tensor:
    """Heads filled up to a width that the kernel takes; each token's heads stay together."""
    return functional.pad(x.transpose(1, 2), (0, -x.shape[-1] % HEAD_ALIGNMENT)).transpose(1, 2)
