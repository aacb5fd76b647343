"""AdamW of any shape, size of gradients and numbers against torch's own in fp64, one step and a hundred."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optplan.optim_impls import AdamW

RUNS = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32_UNIT = 2.0**-24

shapes = st.lists(st.integers(1, 40), max_size=3).map(tuple)
numbers = st.fixed_dictionaries({
    "lr": st.floats(1e-5, 0.1),
    "betas": st.tuples(st.sampled_from([0.0, 0.5, 0.9, 0.95]), st.sampled_from([0.9, 0.95, 0.999])),
    "eps": st.sampled_from([1e-12, 1e-8, 1e-6]),
    "weight_decay": st.sampled_from([0.0, 0.01, 0.3]),
})  # fmt: skip


def _check(
    backend: str, num_steps: int, some_shapes: list[tuple[int, ...]], options: dict[str, float], seed: int, size: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    starts = [torch.randn(shape, generator=generator) for shape in some_shapes]
    ours = [torch.nn.Parameter(start.to(DEVICE, copy=True)) for start in starts]
    exact = [torch.nn.Parameter(start.double()) for start in starts]
    optimizer = AdamW(ours, backend=backend, **options)
    oracle = torch.optim.AdamW(exact, foreach=False, **options)
    for _ in range(num_steps):
        for our, theirs in zip(ours, exact, strict=True):
            gradient = torch.randn(our.shape, generator=generator) * size
            our.grad, theirs.grad = gradient.to(DEVICE), gradient.double()
        optimizer.step()
        oracle.step()
    for our, theirs, start in zip(ours, exact, starts, strict=True):
        # Every step rounds the parameter once or twice, and its change by some units of the largest there was.
        travelled = options["lr"] * num_steps * 10
        allowed = 2 * num_steps * FP32_UNIT * (start.abs().max().item() + travelled) + 16 * FP32_UNIT * travelled
        assert (our.detach().cpu().double() - theirs.detach()).abs().max().item() <= allowed


@given(st.lists(shapes, min_size=1, max_size=3), numbers, st.integers(0, 2**31), st.sampled_from([1e-9, 1e-3, 1, 1e6]))
@settings(max_examples=30)
def test_one_step(some_shapes: list[tuple[int, ...]], options: dict[str, float], seed: int, size: float) -> None:
    _check("torch", 1, some_shapes, options, seed, size)


@given(st.lists(shapes, min_size=1, max_size=3), numbers, st.integers(0, 2**31), st.sampled_from([1e-9, 1e-3, 1, 1e6]))
@settings(max_examples=12)
def test_a_hundred_steps(some_shapes: list[tuple[int, ...]], options: dict[str, float], seed: int, size: float) -> None:
    _check("torch", 100, some_shapes, options, seed, size)


@pytest.mark.skipif(not RUNS, reason="kernels run on a GPU or with TRITON_INTERPRET=1")
@given(st.lists(shapes, min_size=1, max_size=3), numbers, st.integers(0, 2**31), st.sampled_from([1e-9, 1e-3, 1, 1e6]))
@settings(max_examples=10)
def test_two_steps_of_the_kernel(
    some_shapes: list[tuple[int, ...]], options: dict[str, float], seed: int, size: float
) -> None:
    _check("triton", 2, some_shapes, options, seed, size)
