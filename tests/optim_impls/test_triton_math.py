"""The device helpers, each by itself, against torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from optplan.optim_impls.rounding import counter_hash, mix_seed, to_bf16_stochastic
from optplan.optim_impls.triton_math import (
    tl_bf16,
    tl_bf16_stochastic,
    tl_fp32,
    tl_hash,
    tl_hash_block,
    tl_hash_from,
    tl_mix_seed,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPECIAL = [0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 3.4e38, -3.4e38, 1e-40, 9.2e-41, -1e-45]
NON_FINITE = [float("inf"), float("-inf"), float("nan")]


@triton.jit
def _cast_kernel(x_ptr, out_ptr, back_ptr, n: tl.constexpr):
    lane = tl.arange(0, n)
    narrow = tl_bf16(tl.load(x_ptr + lane))
    tl.store(out_ptr + lane, narrow)
    tl.store(back_ptr + lane, tl_fp32(tl.load(out_ptr + lane)))


@triton.jit
def _hash_kernel(out_ptr, block_ptr, start, seed, n: tl.constexpr):
    lane = tl.arange(0, n)
    index = start + lane.to(tl.int64)
    tl.store(out_ptr + lane, tl_hash(index, seed).to(tl.int64))
    tl.store(block_ptr + lane, tl_hash_block(tl.min(index, axis=0), lane, seed).to(tl.int64))


@triton.jit
def _hash_from_kernel(out_ptr, start, seed, n: tl.constexpr):
    lane = tl.arange(0, n)
    first = tl.min(start + lane.to(tl.int64), axis=0)
    tl.store(out_ptr + lane, tl_hash_from(first, lane, seed).to(tl.int64))


@triton.jit
def _seed_kernel(out_ptr, seed, step, ordinal):
    tl.store(out_ptr, tl_mix_seed(seed, step, ordinal).to(tl.int64))


@triton.jit
def _stochastic_kernel(x_ptr, bits_ptr, out_ptr, n: tl.constexpr):
    lane = tl.arange(0, n)
    tl.store(out_ptr + lane, tl_bf16_stochastic(tl.load(x_ptr + lane), tl.load(bits_ptr + lane)))


def _values() -> torch.Tensor:
    values = torch.randn(1024, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.linspace(-38, 38, 1024)
    values[: len(SPECIAL + NON_FINITE)] = torch.tensor(SPECIAL + NON_FINITE)
    return values.to(DEVICE)


def test_casts_round_as_torch_does() -> None:
    x = _values()
    narrow, back = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x)
    _cast_kernel[(1,)](x, narrow, back, n=1024)
    expected = x.to(torch.bfloat16)
    torch.testing.assert_close(narrow, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, expected.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("start", [0, 2**31 - 1024, 2**32 - 1024, 2**32, 5 * 2**33])
@pytest.mark.parametrize("seed", [0, 7, -3])
def test_hash_is_the_reference_s(start: int, seed: int) -> None:
    out, block = (torch.empty(1024, dtype=torch.int64, device=DEVICE) for _ in range(2))
    _hash_kernel[(1,)](out, block, start, seed, n=1024)
    expected = counter_hash(torch.arange(1024, device=DEVICE) + start, seed)
    assert torch.equal(out, expected)
    assert torch.equal(block, expected)


@pytest.mark.parametrize("start", [0, 1, 2**31 - 3, 2**32 - 1023, 2**32 - 1, 2**32 + 5, 5 * 2**33 + 77])
def test_hash_counts_on_past_32_bits(start: int) -> None:
    out = torch.empty(1024, dtype=torch.int64, device=DEVICE)
    _hash_from_kernel[(1,)](out, start, 7, n=1024)
    assert torch.equal(out, counter_hash(torch.arange(1024, device=DEVICE) + start, 7))


@pytest.mark.parametrize(("seed", "step", "ordinal"), [(0, 1, 0), (5, 100000, 290), (2**31 - 1, 3, 17)])
def test_mixed_seed_is_the_reference_s(seed: int, step: int, ordinal: int) -> None:
    out = torch.empty(1, dtype=torch.int64, device=DEVICE)
    _seed_kernel[(1,)](out, seed, step, ordinal)
    assert int(out) == mix_seed(seed, step, ordinal) % 2**32


def test_hash_bits_are_fair_and_differ_by_seed() -> None:
    first, second = (counter_hash(torch.arange(100_000), mix_seed(0, step, 0)) for step in (1, 2))
    for bit in range(32):
        # Four standard deviations of the mean of 100,000 coins.
        assert abs(float((first >> bit & 1).double().mean()) - 0.5) < 4 * 0.5 / 100_000**0.5
        assert abs(float(((first ^ second) >> bit & 1).double().mean()) - 0.5) < 4 * 0.5 / 100_000**0.5


def test_stochastic_rounding_is_the_reference_s() -> None:
    x = _values()
    bits = (counter_hash(torch.arange(1024), 3) & 0xFFFF).to(device=DEVICE, dtype=torch.int32)
    out = torch.empty_like(x, dtype=torch.bfloat16)
    _stochastic_kernel[(1,)](x, bits, out, n=1024)
    torch.testing.assert_close(out, to_bf16_stochastic(x, bits.long()), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [1 + 2**-10, 1 + 2**-7 - 2**-12, -(3 + 2**-9), 1e-3, -7.7e-30])
def test_stochastic_rounding_keeps_the_mean(value: float) -> None:
    x = torch.full((100_000,), value)
    rounded = to_bf16_stochastic(x, counter_hash(torch.arange(100_000), 11) & 0xFFFF).double()
    unit = float(rounded.max() - rounded.min())
    assert 0 < unit <= 2**-7 * abs(value)
    assert abs(float(rounded.mean()) - float(x[0].double())) < 4 * unit / 2 / 100_000**0.5


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 1.5 * 2.0**-130, *NON_FINITE])
def test_stochastic_rounding_keeps_what_bf16_holds(value: Any) -> None:
    bits = counter_hash(torch.arange(1000), 5) & 0xFFFF
    rounded = to_bf16_stochastic(torch.full((1000,), value), bits)
    torch.testing.assert_close(rounded.float(), torch.full((1000,), value), rtol=0, atol=0, equal_nan=True)
