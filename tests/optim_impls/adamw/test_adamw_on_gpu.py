"""What only a CUDA GPU shows: allocations, missing synchronisation, graphs, the compiled kernel's figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optplan.optim_impls import AdamW
from optplan.planner.optimizers.launch import launch_table_bytes
from optplan.planner.tensors import Parameter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SHAPES = [(1,), (63,), (255,), (4097,), (37, 101), (), (0,), (70001,), (3, 65536), (200000,)]
ROUNDINGS = ("nearest", "stochastic", "kahan")


def _parameters(dtype: torch.dtype, *, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, device="cuda").to(dtype)) for s in SHAPES]


def _set_gradients(parameters: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator("cuda").manual_seed(100 + step)
    for p in parameters:
        gradient = torch.randn(p.shape, generator=generator, device="cuda").to(p.dtype)
        if p.grad is None:
            p.grad = gradient
        else:
            p.grad.copy_(gradient)


def _run(dtype: torch.dtype, num_steps: int = 5, *, cls: Any = AdamW, **options: Any) -> list[torch.Tensor]:
    parameters = _parameters(dtype)
    optimizer = cls(parameters, lr=1e-2, weight_decay=0.1, **options)
    for step in range(num_steps):
        _set_gradients(parameters, step)
        optimizer.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_equals_the_reference(dtype: torch.dtype, rounding: str) -> None:
    ours = _run(dtype, rounding=rounding, backend="triton")
    reference = _run(dtype, rounding=rounding, backend="torch")
    for a, b in zip(ours, reference, strict=True):
        assert a.isfinite().all()
        # The arithmetic's last bit may decide a rounding, rarely one in two of the five steps: two units of the dtype.
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(a, b, rtol=(16 if dtype == torch.float32 else 2) * unit, atol=max(unit / 8, 1e-7))
        if a.numel() and dtype != torch.float32:
            assert (a != b).double().mean() < 0.02


def test_fp32_is_within_rounding_of_torch() -> None:
    ours, torchs = _run(torch.float32, 20), _run(torch.float32, 20, cls=torch.optim.AdamW, fused=True)
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_two_runs_are_equal_bit_by_bit(rounding: str) -> None:
    for a, b in zip(_run(torch.bfloat16, rounding=rounding), _run(torch.bfloat16, rounding=rounding), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_step_allocates_the_launch_table_alone_and_never_waits(rounding: str) -> None:
    parameters = _parameters(torch.bfloat16)
    optimizer = AdamW(parameters, rounding=rounding)
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
    described = [Parameter("p", shape, "other", "linear") for shape in SHAPES if 0 not in shape]
    expected = launch_table_bytes(described, num_lists=5 if rounding == "kahan" else 4)
    assert torch.cuda.memory_stats()["requested_bytes.all.peak"] - before == expected


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_graph_replays_steps(rounding: str, scheduled: bool) -> None:
    eager = _run(torch.bfloat16, 6, rounding=rounding, capturable=True)
    parameters = _parameters(torch.bfloat16)
    lr = torch.tensor(1e-2, device="cuda") if scheduled else 1e-2
    optimizer = AdamW(parameters, lr=lr, weight_decay=0.1, rounding=rounding, capturable=True)
    for step in range(3):
        _set_gradients(parameters, step)
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in range(3, 6):
        _set_gradients(parameters, step)
        graph.replay()
    for a, b in zip(eager, parameters, strict=True):
        assert torch.equal(a, b)
    assert all(int(optimizer.state[p]["step"]) == 6 for p in parameters if p.numel())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_counters_on_the_device_give_the_same_steps(rounding: str) -> None:
    ours = _run(torch.float32, 50, rounding=rounding, capturable=True)
    for a, b in zip(ours, _run(torch.float32, 50, rounding=rounding), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


def test_scale_is_read_on_the_device() -> None:
    dtype, halved = torch.float32, []
    for scale in (torch.tensor(0.5, device="cuda"), 0.5):
        parameters = _parameters(dtype)
        optimizer = AdamW(parameters, lr=1e-2)
        _set_gradients(parameters, 0)
        optimizer.step(grad_scale=scale)
        halved.append(parameters)
    for a, b in zip(*halved, strict=True):
        assert torch.equal(a, b)


def test_unaligned_and_transposed_tensors() -> None:
    base = torch.randn(10001, device="cuda")
    ours = [torch.nn.Parameter(base.clone()[1:]), torch.nn.Parameter(torch.randn(64, 33, device="cuda").t())]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    for parameters, optimizer in ((ours, AdamW(ours)), (theirs, torch.optim.AdamW(theirs))):
        for step in range(3):
            _set_gradients(parameters, step)
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


def test_new_numbers_do_not_compile_again() -> None:
    from optplan.optim_impls.adamw.kernels import adamw_kernel

    parameters = _parameters(torch.bfloat16)
    optimizer = AdamW(parameters, lr=1e-2)
    _set_gradients(parameters, 0)
    optimizer.step()
    count = sum(len(cache[0]) for cache in adamw_kernel.device_caches.values())
    for step in range(20):
        optimizer.param_groups[0].update(lr=1.0 + step, weight_decay=0.0, betas=(0.0, 0.5), seed=16 * step)
        optimizer.step()
    assert sum(len(cache[0]) for cache in adamw_kernel.device_caches.values()) == count
