"""Densification: a part of the error feedback in the update of every element, the rest carried on.

The authors quantize the rest once more, with the range that it has; ours keeps the codes and shrinks the ranges.
"""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optplan.optim_impls import MicroAdam
from optplan.optim_impls.micro_adam.optimizer import STATE_NAMES

NaiveMicroAdam = runpy.run_path(str(Path(__file__).with_name("naive_micro_adam.py")))["NaiveMicroAdam"]
ROUNDING = 2.0**-8
"""What rounding to a bfloat16 number changes at the most, of its size."""


# With a half, the ends of the ranges stay bfloat16 numbers, and quantizing once more is to change nothing else.
@pytest.mark.parametrize(
    ("numel", "num_steps", "decay"), [(2048 + 905, 3, 0.1), (333, 100, 0.0), (4096, 3, 0.0), (7, 30, 0.1)]
)
def test_float64_steps_with_half_of_the_error_equal_the_authors_description(
    numel: int, num_steps: int, decay: float
) -> None:
    rng = np.random.default_rng(3)
    start, scale = rng.standard_normal(numel), np.exp(rng.standard_normal(numel))
    naive = NaiveMicroAdam(start, lr=0.01, decay=decay, alpha=0.5)
    parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = MicroAdam([parameter], lr=0.01, weight_decay=decay, alpha=0.5)
    for _ in range(num_steps):
        gradient = rng.standard_normal(numel) * scale
        naive.step(gradient)
        parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
    np.testing.assert_allclose(parameter.detach().numpy(), naive.parameter, rtol=0, atol=1e-12)


def _left_over(state: dict[str, torch.Tensor], numel: int) -> torch.Tensor:
    """What the codes of one block stand for, exactly, beside the larger end of each element's range; float64."""
    place = torch.arange(numel)
    run, j = place // 8, place % 8
    word = state["error_feedback"].view(torch.int32)[run]
    code = (word >> (4 * (j >> 1) + 16 * (j & 1))) & 15
    low, high = (state[name].double()[run % len(state[name])] for name in ("bucket_min", "bucket_max"))
    return torch.stack((low + code * (high - low) / 15, torch.maximum(low.abs(), high.abs())))


@given(
    numel=st.sampled_from([1, 9, 64, 905, 2048]),
    seed=st.integers(0, 2**16),
    alpha=st.floats(0.01, 0.99),
    shift=st.sampled_from([0.0, 1.0, 30.0]),
    rounding=st.sampled_from(["nearest", "stochastic"]),
)
@settings(max_examples=30, deadline=None)
def test_what_is_left_over_shrinks_to_the_rounding_of_its_range(
    numel: int, seed: int, alpha: float, shift: float, rounding: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(numel, generator=generator) + shift
    states = []
    for part in (0.0, alpha):
        parameter = torch.nn.Parameter(torch.zeros(numel))
        optimizer = MicroAdam([parameter], lr=0.1, alpha=part, rounding=rounding, seed=seed, backend="torch")
        parameter.grad = gradient.clone()
        optimizer.step()
        states.append(optimizer.state[parameter])
    assert torch.equal(states[0]["error_feedback"], states[1]["error_feedback"])
    (whole, size), (rest, _) = (_left_over(state, numel) for state in states)
    # The ends alone are rounded, and all levels lie between them.
    assert ((rest - (1 - alpha) * whole).abs() <= ROUNDING * (1 - alpha) * size).all()


@pytest.mark.parametrize("numel", [2048, 905, 100])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_every_element_moves_by_its_part_of_the_error(numel: int, weight_decay: float) -> None:
    gradient = torch.randn(numel, generator=torch.Generator().manual_seed(1))
    moved, states = [], []
    for alpha in (0.0, 0.25):
        parameter = torch.nn.Parameter(torch.ones(numel))
        optimizer = MicroAdam([parameter], lr=0.5, alpha=alpha, weight_decay=weight_decay, backend="torch")
        parameter.grad = gradient.clone()
        optimizer.step()
        moved.append(parameter.detach().double())
        states.append(optimizer.state[parameter])
    error, size = _left_over(states[0], numel)
    # The error feedback is decoded in bfloat16.
    difference = moved[0] - moved[1] - 0.5 * 0.25 * error
    assert (difference.abs() <= 0.5 * 0.25 * 3 * ROUNDING * size + 1e-6).all()
    assert all(torch.equal(states[0][name], states[1][name]) for name in ("window_indices", "window_values"))


@pytest.mark.parametrize("value", [0.0, -0.75])
def test_a_constant_bucket_shrinks_exactly(value: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(64))
    optimizer = MicroAdam([parameter], lr=0.0, block=64, bucket=8, density=0.01, alpha=0.25, backend="torch")
    parameter.grad = torch.full((64,), value)
    optimizer.step()
    state = optimizer.state[parameter]
    # The first element is selected, and in its bucket zero takes its place.
    expected = torch.full((8,), 0.75 * value)
    assert torch.equal(state["bucket_min"].float(), expected)
    expected[0] = 0.0
    assert torch.equal(state["bucket_max"].float(), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), 1e38])
def test_a_block_that_is_not_finite_keeps_all_it_had(bad: float) -> None:
    parameter = torch.nn.Parameter(torch.ones(2048 + 300))
    optimizer = MicroAdam([parameter], lr=0.1, weight_decay=0.1, alpha=0.25, backend="torch")
    for step in range(3):
        gradient = torch.randn(2348, generator=torch.Generator().manual_seed(step))
        if step == 2:
            gradient[2100] = bad
            before = {name: value.clone() for name, value in optimizer.state[parameter].items()}
            old = parameter.detach().clone()
        parameter.grad = gradient
        optimizer.step()
    state = optimizer.state[parameter]
    assert torch.equal(parameter[2048:], old[2048:])
    assert not torch.equal(parameter[:2048], old[:2048])
    for name, first in (("error_feedback", 1024), ("bucket_min", 32), ("bucket_max", 32)):
        assert torch.equal(state[name][first:], before[name][first:]), name
        assert not torch.equal(state[name][:first], before[name][:first]), name


def test_a_checkpoint_carries_alpha_which_is_no_layout() -> None:
    parameter = torch.nn.Parameter(torch.ones(300))
    optimizer = MicroAdam([parameter], lr=0.1, alpha=0.25, backend="torch")
    parameter.grad = torch.randn(300, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    saved = optimizer.state_dict()
    other = MicroAdam([torch.nn.Parameter(torch.ones(300))], lr=0.1, backend="torch")
    other.load_state_dict(saved)
    assert other.param_groups[0]["alpha"] == 0.25
    del saved["param_groups"][0]["alpha"]  # of a checkpoint written before there was such an option
    other.load_state_dict(saved)
    other.param_groups[0]["alpha"] = 0.5
    loaded = other.param_groups[0]["params"][0]
    loaded.grad = torch.ones(300)
    other.step()
    assert [loaded.isfinite().all(), other.state[loaded]["step"]] == [True, 2]
    ours, theirs = (o.state[p] for o, p in ((optimizer, parameter), (other, loaded)))
    assert [ours[name].shape for name in STATE_NAMES] == [theirs[name].shape for name in STATE_NAMES]


def test_a_checkpoint_without_alpha_takes_that_of_the_optimizer() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    saved = MicroAdam([parameter], alpha=0.5).state_dict()
    del saved["param_groups"][0]["alpha"]
    other = MicroAdam([parameter], alpha=0.25)
    other.load_state_dict(saved)
    assert other.param_groups[0]["alpha"] == 0.25


WHY = (
    "alpha must be >= 0 and < 1, got -2: with it the authors' package adds what quantization lost to the parameters "
    "whatever lr is, and keeps a tensor of their size, which this class does not"
)


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (-2, WHY),
        (-0.1, "alpha must be >= 0 and < 1, got -0.1"),
        (1, "alpha must be >= 0 and < 1, got 1.0"),
        (float("nan"), "alpha must be >= 0 and < 1, got nan"),
    ],
)
def test_bad_alpha(alpha: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        MicroAdam([torch.nn.Parameter(torch.zeros(3))], alpha=alpha)
    assert str(error.value) == message
