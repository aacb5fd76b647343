"""What only a CUDA GPU shows: kernels against the reference, repetition, allocations, no synchronisation, graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optplan.optim_impls import Adapprox
from optplan.optim_impls.adapprox.reference import s_rsi, seeded_sketch
from optplan.planner.optimizers.base import OptimizerContext
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.tensors import Parameter
from optplan.planner.timeline import Allocation, TimelineBuilder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SHAPES = [
    (300, 520),
    (129, 1000),
    (37, 101),
    (1000, 64),
    (64, 3, 5, 5),
    (6000, 40),
    (40, 9000),
    (4097,),
    (1, 9),
    (),
    (0,),
]
OPTIONS: list[dict[str, Any]] = [{}, {"betas": (0.0, 0.999)}, {"rank": 20}, {"rank": 64, "clip": 0.5}]
CONTEXT = OptimizerContext("bfloat16", "bfloat16")


def _parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, device="cuda").to(dtype)) for s in SHAPES]


def _set_gradients(parameters: list[torch.nn.Parameter], step: int) -> None:
    """Gradients whose rows and columns have scales of their own, as real ones do."""
    generator = torch.Generator("cuda").manual_seed(100 + step)
    for p in parameters:
        gradient = torch.randn(p.shape, generator=generator, device="cuda")
        if p.dim() >= 2:
            gradient *= torch.linspace(-2, 2, p.shape[0], device="cuda").exp().view(-1, *[1] * (p.dim() - 1))
            gradient *= torch.linspace(1, -2, p.shape[-1], device="cuda").exp()
        if p.grad is None:
            p.grad = gradient.to(p.dtype)
        else:
            p.grad.copy_(gradient)


def _run(dtype: torch.dtype, num_steps: int = 5, **options: Any) -> tuple[list[torch.nn.Parameter], Adapprox]:
    parameters = _parameters(dtype)
    optimizer = Adapprox(parameters, **{"lr": 1e-2, **options})
    for step in range(num_steps):
        _set_gradients(parameters, step)
        optimizer.step()
    return parameters, optimizer


def _peak_bytes(timeline: TimelineBuilder) -> int:
    sizes, alive, peak = {}, 0, 0
    for event in timeline.events:
        if isinstance(event, Allocation):
            sizes[event.id] = event.bytes
            alive += event.bytes
        else:
            alive -= sizes[event.id]
        peak = max(peak, alive)
    return peak


def _product(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return state["q_factor"].double() @ state["u_factor"].double().mT


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_step_equals_the_reference(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """From one state: the update to the dtype's rounding, the second moment held as well as the reference holds it."""
    ours, optimizer = _run(dtype, backend="triton", **options)
    theirs = [torch.nn.Parameter(p.detach().double()) for p in ours]
    reference = Adapprox(theirs, backend="torch", lr=1e-2, **options)
    saved = optimizer.state_dict()
    saved["state"] = {
        place: {n: t.double() if t.dim() and t.device.type == "cuda" else t for n, t in state.items()}
        for place, state in saved["state"].items()
    }
    reference.load_state_dict(saved)
    before = [p.detach().double() for p in ours]
    _set_gradients(ours, 9)
    for a, b in zip(ours, theirs, strict=True):
        b.grad = a.grad.double()
    moments = [_second_moment(optimizer.state[p], p.grad) if p.dim() >= 2 and 1 not in p.shape else None for p in ours]
    optimizer.step()
    reference.step()
    for a, b, start, moment in zip(ours, theirs, before, moments, strict=True):
        difference, change = (a.detach().double() - b.detach()).norm(), (b.detach() - start).norm()
        rounding = (b.detach().to(dtype).double() - b.detach()).norm()
        assert difference <= 2e-3 * change + 1.5 * rounding
        if moment is not None:
            assert _error(moment, optimizer.state[a]) < 1.01 * _error(moment, reference.state[b]) + 1e-3


def _error(moment: torch.Tensor, state: dict[str, torch.Tensor]) -> float:
    return float((moment - _product(state)).norm() / moment.norm())


def _second_moment(state: dict[str, torch.Tensor], gradient: torch.Tensor) -> torch.Tensor:
    low = _product(state)
    return 0.999 * low.clamp(min=0) + 0.001 * gradient.double().reshape(low.shape).square()


def test_a_hundred_steps_hold_the_second_moment_as_the_paper_s_mode_does() -> None:
    """Against the whole second moment in float64: five iterations from noise on it, and the kernels."""
    parameters = _parameters(torch.bfloat16)
    optimizer = Adapprox(parameters, lr=1e-2, backend="triton")
    whole = [torch.zeros(p.shape, dtype=torch.float64, device="cuda") for p in parameters]
    for step in range(100):
        _set_gradients(parameters, step)
        for p, v in zip(parameters, whole, strict=True):
            v.mul_(0.999).addcmul_(p.grad.double(), p.grad.double(), value=0.001)
        optimizer.step()
    for p, v in zip(parameters, whole, strict=True):
        if "q_factor" in (state := optimizer.state[p]):
            v, rank = v.view(len(state["q_factor"]), -1), state["q_factor"].shape[1]
            q, u = s_rsi(v, rank, seeded_sketch(0, step=1, index=0, like=v))
            assert _error(v, state) <= 1.05 * float((v - q @ u.mT).norm() / v.norm()) + 0.01


@pytest.mark.parametrize("options", OPTIONS)
def test_two_runs_are_equal_bit_by_bit(options: dict[str, Any]) -> None:
    (first, one), (again, other) = _run(torch.bfloat16, **options), _run(torch.bfloat16, **options)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
        for name, value in one.state[a].items():
            assert torch.equal(value, other.state[b][name]), name


@pytest.mark.parametrize("options", OPTIONS)
def test_a_step_allocates_what_the_planner_says_and_never_waits(options: dict[str, Any]) -> None:
    parameters, optimizer = _run(torch.bfloat16, 2, backend="triton", **options)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    described = [Parameter(f"p{i}", tuple(p.shape), "other", "linear") for i, p in enumerate(parameters)]
    planned = {"rank": str(options.get("rank", 32)), "beta1": str(options.get("betas", (0.9,))[0])}
    timeline = TimelineBuilder("step")
    build_optimizer("adapprox", planned).write_step(timeline, described, CONTEXT)
    assert torch.cuda.memory_stats()["requested_bytes.all.peak"] - before == _peak_bytes(timeline)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_graph_replays_steps(options: dict[str, Any], scheduled: bool) -> None:
    eager, other = _run(torch.bfloat16, 6, capturable=True, **options)
    parameters = _parameters(torch.bfloat16)
    lr = torch.tensor(1e-2, device="cuda") if scheduled else 1e-2
    optimizer = Adapprox(parameters, lr=lr, capturable=True, **options)
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
        for name, value in other.state[a].items():
            assert torch.equal(value, optimizer.state[b][name]), name


def test_a_scale_on_the_device_is_a_scale_on_the_host() -> None:
    scaled = []
    for scale in (torch.tensor(0.5, device="cuda"), 0.5):
        parameters = _parameters(torch.bfloat16)
        optimizer = Adapprox(parameters, lr=1e-2)
        for step in range(3):
            _set_gradients(parameters, step)
            optimizer.step(grad_scale=scale)
        scaled.append(parameters)
    for a, b in zip(*scaled, strict=True):
        assert torch.equal(a, b)
