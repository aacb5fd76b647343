"""The selection, exact on every family, and the 4-bit codes, within half a step."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optplan.optim_impls.micro_adam.codes import bucket_indices, decode, encode, pack, round_down, unpack
from optplan.optim_impls.micro_adam.layout import layout_of
from optplan.optim_impls.micro_adam.selection import finite_blocks, select_largest

_cases = runpy.run_path(str(Path(__file__).with_name("micro_cases.py")))
FAMILIES, gradient, largest = _cases["FAMILIES"], _cases["gradient"], _cases["largest"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("size", "num_selected"), [(1024, 11), (2048, 21), (300, 3), (7, 1), (64, 64)])
def test_selection_is_exact(family: str, size: int, num_selected: int) -> None:
    blocks = np.stack([gradient(family, size, seed=seed) for seed in range(3)])
    indices = select_largest(torch.from_numpy(blocks), num_selected)
    for row, values in zip(indices.tolist(), blocks, strict=True):
        assert len(row) == num_selected
        assert set(row) == largest(values, num_selected)


def test_the_largest_comes_first_and_of_equals_the_lowest_index() -> None:
    block = torch.tensor([[1.0, -3.0, 2.0, 3.0, -2.0, 0.0]])
    assert select_largest(block, 5).tolist() == [[1, 3, 2, 4, 0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 2.0**120])
def test_a_block_with_one_bad_element_is_not_finite(bad: float) -> None:
    blocks = torch.ones(3, 100)
    blocks[1, 77] = bad
    blocks[2, 5] = 2.0**119
    assert finite_blocks(blocks).flatten().tolist() == [True, False, True]


@given(numel=st.integers(1, 600), seed=st.integers(0, 2**16), exponent=st.integers(-20, 20))
@settings(max_examples=60, deadline=None)
def test_decoded_elements_are_within_half_a_step(numel: int, seed: int, exponent: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    residual = torch.randn(2, numel, generator=generator) * 2.0**exponent + torch.randn(2, 1, generator=generator)
    residual = residual.to(torch.bfloat16).float()
    bucket = bucket_indices(numel, min(8, -(-numel // 8)), device=residual.device)
    codes, low, high = encode(residual, bucket, int(bucket.max()) + 1)
    low32, high32 = low.float()[:, bucket], high.float()[:, bucket]
    step = (high32 - low32) / 15
    error = (decode(codes, low32, high32) - residual).abs()
    assert (low32 <= residual).all()
    assert (residual <= high32).all()
    # Six numbers are rounded to 8 bits on the way: the distance to the low end, the inverse and the unit, each up to 15
    # steps, their product, and the sum, of the size of the ends.
    coarse = 2.0**-9 * (4 * 15 * step + 2 * torch.maximum(low32.abs(), high32.abs()))
    assert (error <= 0.5 * step + coarse).all()


@given(numel=st.integers(1, 300), seed=st.integers(0, 2**16))
@settings(max_examples=30, deadline=None)
def test_float64_is_not_coarse(numel: int, seed: int) -> None:
    residual = torch.randn(1, numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    bucket = bucket_indices(numel, min(8, -(-numel // 8)), device=residual.device)
    codes, low, high = encode(residual, bucket, int(bucket.max()) + 1)
    ends = low.double()[:, bucket], high.double()[:, bucket]
    assert ((decode(codes, *ends) - residual).abs() <= (ends[1] - ends[0]) / 15 * (0.5 + 1e-9)).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -0.75, 3.0e-39, 2.0**119])
def test_a_constant_bucket_decodes_exactly(value: float) -> None:
    residual = torch.full((1, 64), value).to(torch.bfloat16).float()
    codes, low, high = encode(residual, torch.zeros(64, dtype=torch.int64), 1)
    assert torch.equal(decode(codes, low.float().expand(1, 64), high.float().expand(1, 64)), residual)


def test_a_run_of_codes_is_four_bytes_the_even_elements_first() -> None:
    codes = torch.arange(1, 11, dtype=torch.uint8)[None]
    # 1 3 5 7 in the first two bytes, 2 4 6 8 in the others; low halves first. Then a run of two.
    assert pack(codes).tolist() == [[0x31, 0x75, 0x42, 0x86, 0x09, 0x00, 0x0A, 0x00]]
    assert torch.equal(unpack(pack(codes), 10), codes)


def test_ends_of_a_range_are_rounded_outward() -> None:
    x = torch.tensor([1.001, -1.001, 1.0, 0.0])
    assert round_down(x).tolist() == [1.0, -1.0078125, 1.0, 0.0]
    assert (-round_down(-x)).tolist() == [1.0078125, -1.0, 1.0, 0.0]


def test_stochastic_codes_are_unbiased() -> None:
    residual = torch.tensor([[0.0, 15.0] + [4.3] * 20000])
    codes, _, _ = encode(
        residual,
        torch.zeros(20002, dtype=torch.int64),
        1,
        noise=torch.rand(residual.shape, generator=torch.Generator().manual_seed(0)),
    )
    # Each is 4 or 5; the mean of 20,000 has a standard deviation of 0.46 / 141.
    assert set(codes[0, 2:].tolist()) == {4, 5}
    assert abs(codes[0, 2:].float().mean() - 4.3) < 4 * 0.46 / 141


# 5000 = 2 x 2048 + 904 with ceil(9.04) selected of the rest; 33 = ceil(33 / 8) runs in the rest; each bucket has 64.
@pytest.mark.parametrize(
    ("numel", "codes", "buckets", "window"),
    [
        (0, 0, 0, 0),
        (1, 4, 1, 10 * 1),
        (33, 20, 5, 10 * 1),
        (2048, 1024, 32, 10 * 21),
        (5000, 2500, 96, 10 * 52),
        (4097, 2052, 65, 10 * 43),
    ],
)
def test_layouts(numel: int, codes: int, buckets: int, window: int) -> None:
    layout = layout_of(numel, block=2048, bucket=64, window=10, density=0.01)
    assert (layout.num_codes, layout.num_buckets, layout.num_window) == (codes, buckets, window)
    parts = list(layout.parts())
    for name, end in (("elements", numel), ("codes", codes), ("buckets", buckets), ("window", window)):
        pieces = [getattr(part, name) for part in parts]
        assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces)][: len(pieces)]
        assert (pieces[-1].stop if pieces else 0) == end
