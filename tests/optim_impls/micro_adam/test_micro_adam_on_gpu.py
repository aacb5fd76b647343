"""What only a CUDA GPU shows of MicroAdam: allocations, missing synchronisation, graphs, all shapes and dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optplan.optim_impls import MicroAdam
from optplan.optim_impls.micro_adam.optimizer import STATE_NAMES
from optplan.planner.optimizers.launch import launch_table_bytes
from optplan.planner.tensors import Parameter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SHAPES = [(1,), (63,), (255,), (4097,), (37, 101), (), (0,), (70001,), (3, 65536), (2050, 3)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, device="cuda").to(dtype)) for s in SHAPES]


def _set_gradients(parameters: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator("cuda").manual_seed(100 + step)
    for p in parameters:
        gradient = torch.randn(p.shape, generator=generator, device="cuda").to(p.dtype)
        if p.grad is None:
            p.grad = gradient
        else:
            p.grad.copy_(gradient)


def _run(dtype: torch.dtype, num_steps: int, **options: Any) -> tuple[list[torch.nn.Parameter], MicroAdam]:
    parameters = _parameters(dtype)
    optimizer = MicroAdam(parameters, lr=1e-2, **options)
    for step in range(num_steps):
        _set_gradients(parameters, step)
        optimizer.step()
    return parameters, optimizer


def _assert_same_bits(
    ours: tuple[list[torch.nn.Parameter], MicroAdam], theirs: tuple[list[torch.nn.Parameter], MicroAdam]
) -> None:
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert torch.equal(a, b)
        for name in ("step", *STATE_NAMES):
            assert torch.equal(ours[1].state[a][name].cpu(), theirs[1].state[b][name].cpu()), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"rounding": "stochastic", "seed": 3},
        {"bias_correction": "window", "window": 3},
        {"block": 1024, "bucket": 32, "density": 0.02},
        {"block": 4096, "bucket": 128},
        {"block": 256, "bucket": 8},
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_equal_the_reference_over_13_steps(dtype: torch.dtype, options: dict[str, Any]) -> None:
    ours, theirs = (_run(dtype, 13, backend=backend, **options) for backend in ("triton", "torch"))
    for a, b in zip(ours[0], theirs[0], strict=True):
        for name in STATE_NAMES:
            assert torch.equal(ours[1].state[a][name], theirs[1].state[b][name]), name
        # A last bit of the sums may decide a rounding in each of the steps.
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(a, b, rtol=(64 if dtype == torch.float32 else 4) * unit, atol=unit)


def test_100_steps_select_as_the_reference() -> None:
    ours, theirs = (_run(torch.bfloat16, 100, backend=backend) for backend in ("triton", "torch"))
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert all(torch.equal(ours[1].state[a][name], theirs[1].state[b][name]) for name in STATE_NAMES)


@pytest.mark.parametrize("capturable", [False, True])
def test_two_runs_are_equal_bit_by_bit(capturable: bool) -> None:
    _assert_same_bits(*(_run(torch.bfloat16, 13, capturable=capturable) for _ in range(2)))


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_step_allocates_the_launch_table_alone_and_never_waits(capturable: bool, weight_decay: float) -> None:
    _, optimizer = _run(torch.bfloat16, 2, capturable=capturable, weight_decay=weight_decay)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    described = [Parameter("p", shape, "other", "linear") for shape in SHAPES if 0 not in shape]
    expected = launch_table_bytes(described, num_lists=7 + capturable)
    assert torch.cuda.memory_stats()["requested_bytes.all.peak"] - before == expected


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "rounding": "stochastic"}])
@pytest.mark.parametrize("scheduled", [False, True])
def test_20_replays_of_a_graph_are_20_steps(options: dict[str, Any], scheduled: bool) -> None:
    # More steps than the window has rows, so that the slot goes round.
    eager = _run(torch.bfloat16, 23, capturable=True, **options)
    parameters = _parameters(torch.bfloat16)
    lr = torch.tensor(1e-2, device="cuda") if scheduled else 1e-2
    optimizer = MicroAdam(parameters, lr=lr, capturable=True, **options)
    for step in range(3):
        _set_gradients(parameters, step)
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in range(3, 23):
        _set_gradients(parameters, step)
        graph.replay()
    _assert_same_bits(eager, (parameters, optimizer))


@pytest.mark.parametrize("bias_correction", ["full", "window"])
def test_counters_on_the_device_give_the_same_steps(bias_correction: str) -> None:
    ours, theirs = (
        _run(torch.float32, 25, capturable=capturable, bias_correction=bias_correction) for capturable in (True, False)
    )
    for a, b in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)
        assert all(torch.equal(ours[1].state[a][name], theirs[1].state[b][name]) for name in STATE_NAMES)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e38])
def test_a_block_that_is_not_finite_sits_out(bad: float) -> None:
    parameters, optimizer = _run(torch.bfloat16, 4)
    _set_gradients(parameters, 4)
    parameters[7].grad[5000] = bad
    block = slice(2 * 2048, 3 * 2048)
    before = parameters[7].detach().clone()
    codes = optimizer.state[parameters[7]]["error_feedback"].clone()
    optimizer.step()
    assert torch.equal(parameters[7][block], before[block])
    assert not torch.equal(parameters[7], before)
    after = optimizer.state[parameters[7]]["error_feedback"]
    assert torch.equal(after[block.start // 2 : block.stop // 2], codes[block.start // 2 : block.stop // 2])
    assert all(p.isfinite().all() for p in parameters)


def test_new_numbers_do_not_compile_again() -> None:
    from optplan.optim_impls.micro_adam.select_kernels import select_kernel
    from optplan.optim_impls.micro_adam.update_kernels import update_kernel

    kernels = (select_kernel, update_kernel)
    _, optimizer = _run(torch.bfloat16, 1)
    count = [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]
    for step in range(20):
        optimizer.param_groups[0].update(lr=1.0 + step, betas=(0.0, 0.5), eps=1e-3 * step, seed=16 * step)
        optimizer.step()
    assert [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels] == count
