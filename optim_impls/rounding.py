"""Storing fp32 results in fewer bits: nearest, stochastic, Kahan; plain torch, bit for bit what the kernels do."""

from __future__ import annotations

import torch

ROUNDINGS = ("nearest", "stochastic", "kahan")
_MASK = 0xFFFFFFFF


def mix_seed(seed: int, step: int, ordinal: int) -> int:
    """One int32 seed for a tensor's step, from the optimizer's seed, the step and the parameter's ordinal."""
    x = seed & _MASK
    for word in (step, ordinal):
        x = (x ^ (word * 0x9E3779B9 & _MASK)) & _MASK
        x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
        x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
        x ^= x >> 16
    return x - (1 << 32) if x >= 1 << 31 else x


def counter_hash(index: torch.Tensor, seed: int) -> torch.Tensor:
    """32 random bits for each element of an int64 tensor `index`, as int64 in [0, 2^32)."""
    x = (index & _MASK) ^ ((seed + (index >> 32) * 0x9E3779B9) & _MASK)
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)


def to_bf16_stochastic(x: torch.Tensor, random16: torch.Tensor) -> torch.Tensor:
    """fp32 to bf16, up or down with the probability that makes the mean exact.

    Args:
        x: fp32, any shape.
        random16: int64 of x's shape, 16 random bits each.
    """
    bits = x.view(torch.int32).to(torch.int64) & _MASK
    moved = torch.where(x.isfinite(), bits + random16, bits) & 0xFFFF0000
    moved = torch.where(moved >= 1 << 31, moved - (1 << 32), moved).to(torch.int32)
    return torch.where(x.isnan(), x, moved.view(torch.float32)).to(torch.bfloat16)


def random_bits(like: torch.Tensor, seed: int, *, first: int = 0) -> torch.Tensor:
    """32 random bits for each element, int64, of the tensor's shape; counted in its logical order from `first`."""
    return counter_hash(torch.arange(first, first + like.numel(), device=like.device), seed).view(like.shape)


def store(target: torch.Tensor, value: torch.Tensor, random16: torch.Tensor | None) -> None:
    """Write `value` to `target`: to nearest, or stochastically if it is bf16 and random bits are given."""
    if random16 is not None and target.dtype == torch.bfloat16:
        value = to_bf16_stochastic(value, random16)
    target.copy_(value)
