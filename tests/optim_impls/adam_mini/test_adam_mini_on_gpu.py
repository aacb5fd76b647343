"""What only a CUDA GPU shows of Adam-mini: its kernels against fp64, allocations, missing synchronisation, graphs."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from optplan.optim_impls import AdamMini
from optplan.optim_impls.adam_mini.reference import Hyperparameters, adam_mini
from optplan.planner.optimizers.adam_mini_blocks import blocks_of
from optplan.planner.optimizers.adam_mini_work import partial_sum_bytes, table_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
CASES = runpy.run_path(str(Path(__file__).with_name("mini_cases.py")))["CASES"]
ROUNDINGS = ("nearest", "stochastic")
OPTIONS: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
HYPER = Hyperparameters(0.02, 0.9, 0.95, 1e-6, 0.1)


def _parameters(dtype: torch.dtype) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator("cuda").manual_seed(0)
    return {
        name: torch.nn.Parameter(torch.randn(case.shape, generator=generator, device="cuda").to(dtype))
        for name, (case, _) in CASES.items()
    }


def _set_gradients(parameters: dict[str, torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator("cuda").manual_seed(100 + step)
    for p in parameters.values():
        gradient = torch.randn(p.shape, generator=generator, device="cuda").to(p.dtype)
        if p.grad is None:
            p.grad = gradient
        else:
            p.grad.copy_(gradient)


def _optimizer(parameters: dict[str, torch.nn.Parameter], **options: Any) -> AdamMini:
    roles = {parameter: CASES[name][0] for name, parameter in parameters.items()}
    return AdamMini(list(parameters.items()), roles=roles, **{**OPTIONS, **options})


def _run(dtype: torch.dtype, num_steps: int = 5, **options: Any) -> list[torch.Tensor]:
    parameters = _parameters(dtype)
    optimizer = _optimizer(parameters, **options)
    for step in range(num_steps):
        _set_gradients(parameters, step)
        optimizer.step()
    moments = [optimizer.state[p]["exp_avg_sq"] for p in parameters.values()]
    return [*(p.detach() for p in parameters.values()), *moments]


@pytest.mark.parametrize("num_steps", [1, 100])
def test_fp32_steps_are_those_of_fp64(num_steps: int) -> None:
    parameters = _parameters(torch.float32)
    expected = {name: parameter.detach().double() for name, parameter in parameters.items()}
    blocks = {name: blocks_of(case) for name, (case, _) in CASES.items()}
    m = {name: torch.zeros_like(value) for name, value in expected.items()}
    v = {name: torch.zeros(blocks[name].state_shape, dtype=torch.float64, device="cuda") for name in expected}
    optimizer = _optimizer(parameters)
    for step in range(1, num_steps + 1):
        _set_gradients(parameters, step)
        optimizer.step()
        for name, parameter in parameters.items():
            expected[name] = adam_mini(
                expected[name], parameter.grad.double(), m[name], v[name], blocks=blocks[name], step=step,
                hyperparameters=HYPER,
            )  # fmt: skip
    for name, parameter in parameters.items():
        # A step moves about lr; a rounding of fp32 is 6e-8 of the parameter's size.
        error = (parameter.detach().double() - expected[name]).abs().max().item()
        assert error <= 2e-7 * (4 + num_steps), name
        torch.testing.assert_close(optimizer.state[parameter]["exp_avg_sq"].double(), v[name], rtol=2e-6, atol=0)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_round_as_the_reference(dtype: torch.dtype, rounding: str) -> None:
    ours = _run(dtype, 1, rounding=rounding, backend="triton")
    reference = _run(dtype, 1, rounding=rounding, backend="torch")
    unit = torch.finfo(dtype).eps
    for a, b in zip(ours, reference, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=unit, atol=unit / 8)
        assert (a != b).double().mean() < 0.02 or a.dtype == torch.float32


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_equal_bit_by_bit(dtype: torch.dtype, rounding: str) -> None:
    for a, b in zip(_run(dtype, rounding=rounding), _run(dtype, rounding=rounding), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_step_allocates_what_the_planner_says_and_never_waits(rounding: str) -> None:
    parameters = _parameters(torch.bfloat16)
    optimizer = _optimizer(parameters, rounding=rounding)
    for step in range(2):
        _set_gradients(parameters, step)
        optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    blocks = [blocks_of(case) for case, _ in CASES.values()]
    expected = sum(map(table_bytes, blocks)) + sum(map(partial_sum_bytes, blocks))
    assert torch.cuda.memory_stats()["requested_bytes.all.peak"] - before == expected


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_graph_replays_steps(rounding: str, scheduled: bool) -> None:
    eager = _run(torch.bfloat16, 6, rounding=rounding, capturable=True)
    parameters = _parameters(torch.bfloat16)
    lr = torch.tensor(OPTIONS["lr"], device="cuda", dtype=torch.float64) if scheduled else OPTIONS["lr"]
    optimizer = _optimizer(parameters, lr=lr, rounding=rounding, capturable=True)
    for step in range(3):
        _set_gradients(parameters, step)
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in range(3, 6):
        _set_gradients(parameters, step)
        graph.replay()
    found = [*parameters.values(), *(optimizer.state[p]["exp_avg_sq"] for p in parameters.values())]
    for a, b in zip(eager, found, strict=True):
        assert torch.equal(a, b)
    assert all(int(optimizer.state[p]["step"]) == 6 for p in parameters.values())


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_counters_on_the_device_give_the_same_steps(rounding: str) -> None:
    ours = _run(torch.float32, 50, rounding=rounding, capturable=True)
    for a, b in zip(ours, _run(torch.float32, 50, rounding=rounding), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


def test_gradients_that_move_are_followed() -> None:
    """A new gradient in another place, another dtype of the scale, and the first place again."""
    runs = []
    for moving in (False, True):
        parameters = _parameters(torch.float32)
        optimizer = _optimizer(parameters)
        kept = []
        for step in range(4):
            if moving:
                kept.append([p.grad for p in parameters.values()])
                for p in parameters.values():
                    p.grad = None
            _set_gradients(parameters, step)
            optimizer.step(grad_scale=torch.tensor(0.5, device="cuda") if step == 2 else 0.5)
        runs.append(list(parameters.values()))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
