"""Error feedback in 4-bit codes: sixteen levels between the smallest and the largest element of a bucket."""

from __future__ import annotations

import torch

from optplan.optim_impls.micro_adam.layout import RUN_NUMEL

MAX_CODE = 15
SMALLEST_RANGE = 1e-30
"""Ranges up to this are one level: 15 / range would overflow float32."""


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Bytes `[blocks, ceil(numel / 2)]` of codes `[blocks, numel]`, the even element in the low half."""
    padded = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return padded[:, 0::2] | (padded[:, 1::2] << 4)


def unpack(packed: torch.Tensor, numel: int) -> torch.Tensor:
    """Codes `[blocks, numel]` of bytes `[blocks, ceil(numel / 2)]`."""
    return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)[:, :numel]


def bucket_indices(numel: int, num_buckets: int, *, device: torch.device) -> torch.Tensor:
    """The bucket `[numel]` of every element of a block."""
    return torch.arange(numel, device=device) // RUN_NUMEL % num_buckets


def decode(codes: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Levels `low + code (high - low) / 15` in the dtype of `low`.

    All arguments are `[blocks, numel]`, the range already spread over its elements. The GPU reads a code as the float
    `1 + code / 16`; the same expression here, with a scale short enough for exact products, keeps both bit for bit.
    """
    scale = _shorten((high - low) * (16 / 15))
    return (1 + codes.to(low.dtype) / 16) * scale + (low - scale)


def _shorten(scale: torch.Tensor) -> torch.Tensor:
    """The scale with 19 significant bits, rounded toward zero."""
    if scale.dtype != torch.float32:
        return scale
    return (scale.view(torch.int32) & ~0x1F).view(torch.float32)


def encode(
    residual: torch.Tensor, bucket: torch.Tensor, num_buckets: int, *, noise: torch.Tensor | float = 0.5
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes `[blocks, numel]` (uint8) and the ranges `[blocks, num_buckets]` (bfloat16) that decode them.

    The ends of a range are rounded outward, so that every element lies within.

    Args:
        residual: `[blocks, numel]`.
        bucket: Bucket of each element, `[numel]`.
        num_buckets: Ranges of a block.
        noise: What is added before rounding down: 0.5 rounds to nearest, uniform noise `[blocks, numel]` is unbiased.
    """
    where = bucket.expand_as(residual)
    ends = residual.new_zeros(residual.shape[0], num_buckets)
    low = round_down(ends.scatter_reduce(1, where, residual, "amin", include_self=False))
    high = -round_down(-ends.scatter_reduce(1, where, residual, "amax", include_self=False))
    span = (high.to(residual.dtype) - low.to(residual.dtype))[:, bucket]
    inverse = torch.where(span > SMALLEST_RANGE, MAX_CODE / span, 0)
    levels = (residual - low.to(residual.dtype)[:, bucket]) * inverse + noise
    return levels.clamp(0, MAX_CODE).to(torch.uint8), low, high


def round_down(x: torch.Tensor) -> torch.Tensor:
    """The largest bfloat16 not above `x`."""
    nearest = x.to(torch.bfloat16)
    below = torch.nextafter(nearest, torch.full_like(nearest, -torch.inf))
    return torch.where(nearest.to(x.dtype) > x, below, nearest)
