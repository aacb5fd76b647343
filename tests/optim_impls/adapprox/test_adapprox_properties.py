"""The kernels on drawn shapes and values against float64, and on many steps against the paper's factorisation."""

from __future__ import annotations

import os
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from optplan.optim_impls import Adapprox
from optplan.optim_impls.adapprox.reference import s_rsi, seeded_sketch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
State = dict[str, Any]


def _gradient(shape: tuple[int, int], *, scale: float, zero_rows: int, seed: int) -> torch.Tensor:
    """Heavy-tailed, rows and columns of scales of their own, some rows without any."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randn(n, generator=generator).exp() for n in shape)
    gradient = torch.randn(shape, generator=generator) * rows[:, None] * columns * scale
    gradient[:zero_rows] = 0
    return gradient.to(DEVICE)


def _product(state: State) -> torch.Tensor:
    product: torch.Tensor = state["q_factor"].double() @ state["u_factor"].double().mT
    return product


def _error(moment: torch.Tensor, state: State) -> float:
    return float((moment - _product(state)).norm() / moment.norm())


@settings(max_examples=6)
@given(
    rows=st.integers(2, 150),
    columns=st.integers(2, 150),
    rank=st.integers(1, 20),
    exponent=st.integers(-6, 4),
    zero_rows=st.integers(0, 3),
    beta1=st.sampled_from([0.0, 0.9]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**20),
)
def test_a_step_of_any_matrix_is_the_float64_step(
    rows: int, columns: int, rank: int, exponent: int, zero_rows: int, beta1: float, dtype: torch.dtype, seed: int
) -> None:
    shape, options = (rows, columns), {"lr": 0.01, "rank": rank, "betas": (beta1, 0.999), "weight_decay": 0.0}
    grads = [_gradient(shape, scale=10.0**exponent, zero_rows=zero_rows, seed=seed + i).to(dtype) for i in range(3)]
    exact = torch.nn.Parameter(_gradient(shape, scale=1.0, zero_rows=0, seed=seed).to(dtype).double())
    reference = Adapprox([exact], backend="torch", **options)
    for grad in grads[:2]:
        exact.grad = grad.double()
        reference.step()
    ours = torch.nn.Parameter(exact.detach().to(dtype))
    exact.data = ours.detach().double()
    kernels = Adapprox([ours], backend="triton", **options)
    ours.grad, exact.grad = grads[2], grads[2].double()
    kernels.load_state_dict(_lowered(reference.state_dict(), dtype))
    moment = 0.999 * _product(reference.state[exact]).clamp(min=0) + 0.001 * exact.grad.square()
    before = exact.detach().clone()
    reference.step()
    kernels.step()
    if beta1 == 0.0:  # the first moment was rounded on the way
        change = (exact.detach() - before).norm()
        rounding = (exact.detach().to(dtype).double() - exact.detach()).norm()
        assert (ours.detach().double() - exact.detach()).norm() <= 2e-3 * change + 1.5 * rounding
    if moment.norm() > 0:
        assert _error(moment, kernels.state[ours]) < 1.01 * _error(moment, reference.state[exact]) + 2e-3


def _lowered(saved: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A float64 checkpoint as one of parameters of `dtype`: factors in fp32."""
    kinds = {"exp_avg": dtype, "q_factor": torch.float32, "u_factor": torch.float32}
    states = {k: {n: t.to(kinds.get(n, t.dtype)) for n, t in state.items()} for k, state in saved["state"].items()}
    return saved | {"state": states}


def test_many_steps_of_the_kernels_hold_the_second_moment_as_the_paper_does() -> None:
    """Heavy tails whose scales drift; five iterations from noise on the whole second moment are the yardstick."""
    generator = torch.Generator().manual_seed(7)
    logs = [torch.randn(n, generator=generator) for n in (96, 72)]
    parameter = torch.nn.Parameter(torch.zeros(96, 72, dtype=torch.bfloat16, device=DEVICE))
    optimizer = Adapprox([parameter], betas=(0.0, 0.99), rank=12, backend="triton")
    whole = torch.zeros(96, 72, dtype=torch.float64, device=DEVICE)
    for _ in range(40):
        for log in logs:
            log.add_(torch.randn(log.shape, generator=generator), alpha=0.02)
        scale = (logs[0][:, None] + logs[1]).exp()
        parameter.grad = (scale * torch.randn(scale.shape, generator=generator)).to(parameter)
        whole = 0.99 * whole + 0.01 * parameter.grad.double().square()
        optimizer.step()
    q, u = s_rsi(whole, 12, seeded_sketch(0, step=1, index=0, like=whole))
    paper = float((whole - q @ u.mT).norm() / whole.norm())
    assert _error(whole, optimizer.state[parameter]) <= 1.05 * paper + 0.01
