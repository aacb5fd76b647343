"""The reference against an oracle in plain Python, and what the paper promises."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optplan.optim_impls import MicroAdam
from optplan.optim_impls.micro_adam.reference import Hyperparameters

NaiveMicroAdam = runpy.run_path(str(Path(__file__).with_name("naive_micro_adam.py")))["NaiveMicroAdam"]


def _gradients(numel: int, num_steps: int) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    scale = np.exp(rng.standard_normal(numel))
    return [rng.standard_normal(numel) * scale for _ in range(num_steps)]


@pytest.mark.parametrize(("numel", "num_steps", "decay"), [(2048 + 905, 1, 0.1), (2048 + 905, 3, 0.1), (333, 100, 0.0)])
def test_float64_steps_equal_the_oracle(numel: int, num_steps: int, decay: float) -> None:
    start = np.random.default_rng(1).standard_normal(numel)
    naive = NaiveMicroAdam(start, lr=0.01, decay=decay)
    parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = MicroAdam([parameter], lr=0.01, weight_decay=decay)
    for gradient in _gradients(numel, num_steps):
        naive.step(gradient)
        parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
    np.testing.assert_allclose(parameter.detach().numpy(), naive.parameter, rtol=0, atol=1e-12)


@given(numel=st.integers(1, 2300), seed=st.integers(0, 2**16), exponent=st.integers(-20, 20), zeros=st.booleans())
@settings(max_examples=25, deadline=None)
def test_one_float64_step_of_any_shape_equals_the_oracle(numel: int, seed: int, exponent: int, zeros: bool) -> None:
    rng = np.random.default_rng(seed)
    gradient = rng.standard_normal(numel) * 2.0**exponent * (rng.integers(0, 2, size=numel) if zeros else 1)
    naive = NaiveMicroAdam(np.zeros(numel), lr=0.01)
    parameter = torch.nn.Parameter(torch.zeros(numel, dtype=torch.float64))
    optimizer = MicroAdam([parameter], lr=0.01)
    for _ in range(2):  # the second with what the first left over
        naive.step(gradient)
        parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
    np.testing.assert_allclose(parameter.detach().numpy(), naive.parameter, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_100_steps_come_as_far_as_in_float64(dtype: torch.dtype) -> None:
    # A code on the edge of rounding falls either way, and from then on selections differ now and then; but as much of
    # the way to the target is made.
    target = torch.randn(2100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left = []
    for kind in (dtype, torch.float64):
        parameter = torch.nn.Parameter(torch.zeros(2100, dtype=kind))
        optimizer = MicroAdam([parameter], lr=0.1, backend="torch", density=0.02)
        for noise in _gradients(2100, 100):
            parameter.grad = (parameter.detach().double() - target + 0.1 * torch.from_numpy(noise)).to(kind)
            optimizer.step()
        left.append(float((parameter.detach().double() - target).norm() / target.norm()))
    assert left[1] < 0.9
    assert left[0] < 1.05 * left[1]


def _one(numel: int = 300, **options: Any) -> tuple[torch.nn.Parameter, MicroAdam]:
    parameter = torch.nn.Parameter(torch.zeros(numel))
    return parameter, MicroAdam([parameter], lr=0.1, backend="torch", **options)


def _step(parameter: torch.nn.Parameter, optimizer: MicroAdam, **values: float) -> None:
    parameter.grad = torch.zeros_like(parameter)
    for place, value in values.items():
        parameter.grad[int(place.removeprefix("at"))] = value
    optimizer.step()


def test_the_window_rotates() -> None:
    parameter, optimizer = _one(window=3, density=0.001)  # one of 300 is selected
    for step in range(5):
        _step(parameter, optimizer, **{f"at{step}": 1.0 + step})
    state = optimizer.state[parameter]
    # Steps 4, 5 and 3 are in rows 0, 1 and 2.
    assert state["window_indices"].tolist() == [3, 4, 2]
    assert state["window_values"].tolist() == [4.0, 5.0, 3.0]
    before = parameter.detach().clone()
    _step(parameter, optimizer, at7=1.0)
    assert (parameter != before).nonzero().flatten().tolist() == [3, 4, 7]


def test_what_is_selected_leaves_nothing_but_the_code_of_zero() -> None:
    parameter, optimizer = _one(64, block=64, bucket=64, density=0.01)
    gradient = torch.linspace(-1.0, 1.0, 64)
    gradient[10] = 9.0
    parameter.grad = gradient
    optimizer.step()
    state = optimizer.state[parameter]
    low, high = state["bucket_min"].float(), state["bucket_max"].float()
    assert (low.item(), high.item()) == (-1.0, 1.0)
    # Zero lies between codes 7 and 8: (0 + 1) x 15 / 2 = 7.5, which rounds to even. Element 10 is the third of its run.
    assert state["error_feedback"][4] >> 4 == 8


@pytest.mark.parametrize("gradient", [0.0, 0.5])
def test_constant_gradients(gradient: float) -> None:
    parameter, optimizer = _one(numel=100)
    for _ in range(3):
        parameter.grad = torch.full((100,), gradient)
        optimizer.step()
    # The lowest index each time: what is left of an element already selected is less.
    assert parameter.nonzero().flatten().tolist() == ([] if gradient == 0 else [0, 1, 2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
def test_a_block_that_is_not_finite_sits_out(bad: float) -> None:
    torch.manual_seed(0)
    parameter, optimizer = _one(2048 + 300, weight_decay=0.1)
    gradients = [torch.randn(2348) for _ in range(4)]
    for step, gradient in enumerate(gradients):
        parameter.grad = gradient.clone()
        if step == 2:
            parameter.grad[2100] = bad
        before = {name: value.clone() for name, value in optimizer.state[parameter].items()}
        old = parameter.detach().clone()
        optimizer.step()
        if step == 2:
            state = optimizer.state[parameter]
            assert torch.equal(parameter[2048:], old[2048:])
            assert not torch.equal(parameter[:2048], old[:2048])
            assert torch.equal(state["error_feedback"][1024:], before["error_feedback"][1024:])
            assert torch.equal(state["bucket_min"][32:], before["bucket_min"][32:])
            assert state["window_indices"][10 * 21 + 2 * 3 :][:3].tolist() == [-1, -1, -1]
            assert state["window_values"][10 * 21 + 2 * 3 :][:3].tolist() == [0, 0, 0]
    assert optimizer.state[parameter]["step"] == 4
    assert parameter.isfinite().all()


# Section 1.1 of the paper's analysis by hand: a coordinate selected at every step with the same gradient moves by lr x
# |u|; the window forgets while the correction does not.
@pytest.mark.parametrize(
    ("step", "correction", "size"),
    [(1, "full", 1.0), (10, "full", 1.0), (100, "full", 2.01), (1000, "full", 5.19), (1000, "window", 1.0)],
)
def test_size_of_an_update(step: int, correction: str, size: float) -> None:
    first, second = Hyperparameters(1.0, bias_correction=correction).corrections(step=step, window=10)
    ages = range(min(step, 10))
    moment, square = first * sum(0.9**age for age in ages), second * sum(0.999**age for age in ages)
    assert moment / square**0.5 == pytest.approx(size, abs=0.005)


def test_parameters_that_miss_steps_keep_their_own_count() -> None:
    often, seldom = torch.nn.Parameter(torch.zeros(100)), torch.nn.Parameter(torch.zeros(100))
    optimizer = MicroAdam([often, seldom], lr=0.1, backend="torch")
    for step in range(4):
        often.grad = torch.ones(100)
        seldom.grad = torch.ones(100) if step == 3 else None
        optimizer.step()
    assert (optimizer.state[often]["step"], optimizer.state[seldom]["step"]) == (4, 1)
    assert seldom[0].item() == pytest.approx(-0.1)
