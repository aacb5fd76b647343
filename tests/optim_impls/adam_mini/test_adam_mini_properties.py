"""Adam-mini of any role and shape against a loop over its blocks in fp64, one step and a hundred."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optplan.optim_impls import AdamMini
from optplan.planner.tensors import HeadLayout, Parameter, Role

RUNS = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32_UNIT = 2.0**-24
Case = tuple[Parameter, list[int]]
"""A parameter, and the first output neuron of each block with their number at the end; no neurons: one block."""


def _matrix(role: Role, bounds: list[int], inputs: int, heads: HeadLayout | None, *, transposed: bool) -> Case:
    shape = (inputs, bounds[-1]) if transposed else (bounds[-1], inputs)
    module, axes = ("conv1d", (1,)) if transposed else ("linear", (0,))
    return Parameter("p", shape, role, module, axes, heads), bounds  # type: ignore[arg-type]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Rows, heads, fused queries, keys and values in both orders, whole tensors."""
    kind = draw(st.sampled_from(["rows", "heads", "fused", "interleaved", "whole"]))
    inputs, transposed = draw(st.integers(1, 40)), draw(st.booleans())
    if kind == "whole":
        return Parameter("p", (draw(st.integers(1, 300)),), "norm", "layer_norm"), []
    if kind == "rows":
        return _matrix("mlp", list(range(draw(st.integers(1, 40)) + 1)), inputs, None, transposed=transposed)
    width, keys, group = draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    if kind == "heads":
        heads = HeadLayout(width, num_query_heads=keys)
        return _matrix("query", [width * head for head in range(keys + 1)], inputs, heads, transposed=transposed)
    heads = HeadLayout(width, group * keys, keys, keys, interleaved=kind == "interleaved")
    periods = keys if kind == "interleaved" else 1
    bounds = [0]
    for _ in range(periods):
        bounds += [bounds[-1] + width * (1 + head) for head in range((group * keys + keys) // periods)]
        bounds += [bounds[-1] + 1 + neuron for neuron in range(width * keys // periods)]
    return _matrix("fused_qkv", bounds, inputs, heads, transposed=transposed)


def _exact_step(w: torch.Tensor, g: torch.Tensor, state: dict[str, Any], case: Case, step: int) -> torch.Tensor:
    """The paper's step in fp64, block by block."""
    parameter, bounds = case
    neurons = g.movedim(parameter.output_axes[0], 0) if bounds else g[None]
    state.setdefault("m", torch.zeros_like(w)).mul_(0.9).add_(g, alpha=0.1)
    denominators = torch.empty_like(neurons)
    v = state.setdefault("v", [0.0] * (max(1, len(bounds) - 1)))
    for number, (first, end) in enumerate(pairwise(bounds or [0, 1])):
        v[number] = 0.95 * v[number] + 0.05 * neurons[first:end].square().mean().item()
        denominators[first:end] = (v[number] / (1 - 0.95**step)) ** 0.5 + 1e-8
    spread = denominators.movedim(0, parameter.output_axes[0]) if bounds else denominators[0]
    return w * (1 - 0.02 * 0.1) - 0.02 * (state["m"] / (1 - 0.9**step)) / spread


def _check(backend: str, num_steps: int, some: list[Case], seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    starts = [torch.randn(parameter.shape, generator=generator) for parameter, _ in some]
    ours = [torch.nn.Parameter(start.to(DEVICE, copy=True)) for start in starts]
    exact, states = [start.double() for start in starts], [dict[str, Any]() for _ in some]
    roles = {tensor: parameter for tensor, (parameter, _) in zip(ours, some, strict=True)}
    optimizer = AdamMini(ours, roles=roles, lr=0.02, betas=(0.9, 0.95), weight_decay=0.1, backend=backend)
    for step in range(1, num_steps + 1):
        for place, our in enumerate(ours):
            gradient = torch.randn(our.shape, generator=generator) * size
            our.grad = gradient.to(DEVICE)
            exact[place] = _exact_step(exact[place], gradient.double(), states[place], some[place], step)
        optimizer.step()
    for our, expected, start in zip(ours, exact, starts, strict=True):
        # Every step rounds the parameter once or twice, and its change by some units of the largest there was.
        travelled = 0.02 * num_steps * 10
        allowed = 2 * num_steps * FP32_UNIT * (start.abs().max().item() + travelled) + 16 * FP32_UNIT * travelled
        assert (our.detach().cpu().double() - expected).abs().max().item() <= allowed


some_cases = st.lists(cases(), min_size=1, max_size=3)
sizes = st.sampled_from([1e-6, 1e-3, 1.0, 1e6])


@given(some_cases, st.integers(0, 2**31), sizes)
@settings(max_examples=40)
def test_one_step(some: list[Case], seed: int, size: float) -> None:
    _check("torch", 1, some, seed, size)


@given(some_cases, st.integers(0, 2**31), sizes)
@settings(max_examples=8)
def test_a_hundred_steps(some: list[Case], seed: int, size: float) -> None:
    _check("torch", 100, some, seed, size)


@pytest.mark.skipif(not RUNS, reason="kernels run on a GPU or with TRITON_INTERPRET=1")
@given(some_cases, st.integers(0, 2**31), sizes)
@settings(max_examples=15)
def test_two_steps_of_the_kernels(some: list[Case], seed: int, size: float) -> None:
    _check("triton", 2, some, seed, size)
