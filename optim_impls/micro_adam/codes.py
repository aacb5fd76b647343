"""Error feedback in 4-bit codes: sixteen levels between the smallest and the largest element of a bucket."""

from __future__ import annotations

import torch

from optplan.optim_impls.micro_adam.layout import RUN_NUMEL

MAX_CODE = 15
SMALLEST_RANGE = 1e-30
"""Ranges up to this are one level: 15 / range would overflow float32."""
_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Bytes `[blocks, 4 ceil(numel / 8)]` of codes `[blocks, numel]`.

    Eight elements take four bytes, low halves first: elements 0, 2, 4, 6, then 1, 3, 5, 7. Read as an integer, both
    elements of a pair are 16 bits apart, as in a register that holds two bfloat16 numbers.
    """
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % RUN_NUMEL)).view(len(codes), -1, RUN_NUMEL)
    halves = padded[..., _ORDER].flatten(1)
    return halves[:, 0::2] | (halves[:, 1::2] << 4)


def unpack(packed: torch.Tensor, numel: int) -> torch.Tensor:
    """Codes `[blocks, numel]` of bytes `[blocks, 4 ceil(numel / 8)]`."""
    halves = torch.stack((packed & 15, packed >> 4), dim=2).view(packed.shape[0], -1, RUN_NUMEL)
    codes = torch.empty_like(halves)
    codes[..., _ORDER] = halves
    return codes.flatten(1)[:, :numel]


def bucket_indices(numel: int, num_buckets: int, *, device: torch.device) -> torch.Tensor:
    """The bucket `[numel]` of every element of a block."""
    return torch.arange(numel, device=device) // RUN_NUMEL % num_buckets


def coarse(x: torch.Tensor) -> torch.Tensor:
    """The nearest bfloat16 numbers, in the dtype of `x`; float64 stays as it is, for references."""
    return x if x.dtype == torch.float64 else x.to(torch.bfloat16).to(x.dtype)


def decode(codes: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Levels `low + code (high - low) / 15` in the dtype of `low`, in bfloat16's arithmetic.

    All arguments are `[blocks, numel]`, the range already spread over its elements.
    """
    unit = coarse((high - low) * (1 / MAX_CODE))
    return coarse(coarse(codes.to(low.dtype) * unit) + low)


def encode(
    residual: torch.Tensor,
    bucket: torch.Tensor,
    num_buckets: int,
    *,
    with_zero: bool = False,
    noise: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes `[blocks, numel]` (uint8) and the ranges `[blocks, num_buckets]` (bfloat16) that decode them.

    Ends of a range that are no bfloat16 numbers are rounded outward, so that every element lies within.

    Args:
        residual: `[blocks, numel]`.
        bucket: Bucket of each element, `[numel]`.
        num_buckets: Ranges of a block.
        with_zero: Whether every range is to hold zero.
        noise: Added before rounding down, uniform `[blocks, numel]`; codes are rounded to nearest without it.
    """
    where = bucket.expand_as(residual)
    ends = residual.new_zeros(residual.shape[0], num_buckets)
    low = round_down(ends.scatter_reduce(1, where, residual, "amin", include_self=with_zero))
    high = -round_down(-ends.scatter_reduce(1, where, residual, "amax", include_self=with_zero))
    span = (high.to(residual.dtype) - low.to(residual.dtype))[:, bucket]
    inverse = coarse(torch.where(span > SMALLEST_RANGE, torch.full_like(span, MAX_CODE) / span, 0))
    levels = coarse(residual - low.to(residual.dtype)[:, bucket]) * inverse
    # A bfloat16 number from 128 to 256 has no bits below one, so that a GPU rounds by adding 128.
    levels = levels.round() if noise is None else (levels + noise).floor()
    return levels.clamp(0, MAX_CODE).to(torch.uint8), low, high


def round_down(x: torch.Tensor) -> torch.Tensor:
    """The largest bfloat16 not above `x`."""
    nearest = x.to(torch.bfloat16)
    below = torch.nextafter(nearest, torch.full_like(nearest, -torch.inf))
    return torch.where(nearest.to(x.dtype) > x, below, nearest)
