"""The kernels in Triton's interpreter, or on a GPU where there is one, against the reference in fp64."""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from optplan.optim_impls import AdamMini
from optplan.optim_impls.adam_mini.reference import Hyperparameters, adam_mini
from optplan.planner.optimizers.adam_mini_blocks import blocks_of

CASES = runpy.run_path(str(Path(__file__).with_name("mini_cases.py")))["CASES"]
CUDA = torch.cuda.is_available()
RUNS = CUDA or os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA else "cpu"
OPTIONS: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
HYPER = Hyperparameters(0.02, 0.9, 0.95, 1e-6, 0.1)

needs_kernels = pytest.mark.skipif(not RUNS, reason="kernels run on a GPU or with TRITON_INTERPRET=1")
# What one rounding to the dtype may move a value of size about 1, several times over.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def _tensors(dtype: torch.dtype, *, grad_dtype: torch.dtype | None = None) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (parameter, _) in CASES.items():
        tensor = torch.nn.Parameter(torch.randn(parameter.shape, generator=generator).to(DEVICE, dtype))
        tensors[name] = tensor
    _set_gradients(tensors, generator, grad_dtype or dtype)
    return tensors


def _set_gradients(tensors: dict[str, torch.nn.Parameter], generator: torch.Generator, dtype: torch.dtype) -> None:
    for tensor in tensors.values():
        gradient = torch.randn(tensor.shape, generator=generator).to(DEVICE, dtype)
        tensor.grad = gradient if dtype == tensor.dtype else None
        if dtype != tensor.dtype:
            tensor.grad_dtype = None  # type: ignore[attr-defined]
            tensor.grad = gradient


def _optimizer(tensors: dict[str, torch.nn.Parameter], **options: Any) -> AdamMini:
    roles = {tensor: CASES[name][0] for name, tensor in tensors.items()}
    return AdamMini(list(tensors.items()), roles=roles, **{**OPTIONS, "backend": "triton", **options})


def _expected(tensors: dict[str, torch.nn.Parameter], *, steps: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Parameters after steps with the same gradients, in fp64 throughout."""
    expected = {}
    for name, tensor in tensors.items():
        blocks = blocks_of(CASES[name][0])
        w, g = tensor.detach().double().cpu(), tensor.grad.double().cpu() * scale
        m, v = torch.zeros_like(w), torch.zeros(blocks.state_shape, dtype=torch.float64)
        for step in range(1, steps + 1):
            w = adam_mini(w, g, m, v, blocks=blocks, step=step, hyperparameters=HYPER)
        expected[name] = w
    return expected


def _check(tensors: dict[str, torch.nn.Parameter], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, tensor in tensors.items():
        found = tensor.detach().double().cpu()
        assert (found - expected[name]).abs().max().item() <= tolerance * 4, name


@needs_kernels
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_steps_equal_the_reference_in_fp64(dtype: torch.dtype) -> None:
    tensors = _tensors(dtype)
    expected = _expected(tensors, steps=2)
    optimizer = _optimizer(tensors)
    for _ in range(2):
        optimizer.step()
    _check(tensors, expected, TOLERANCE[dtype])


@needs_kernels
@pytest.mark.parametrize("on_device", [False, True])
def test_gradients_are_scaled_inside_the_step(on_device: bool) -> None:
    tensors = _tensors(torch.float32)
    expected = _expected(tensors, steps=1, scale=0.37)
    before = {name: tensor.grad.clone() for name, tensor in tensors.items()}
    _optimizer(tensors).step(grad_scale=torch.tensor(0.37, device=DEVICE) if on_device else 0.37)
    _check(tensors, expected, TOLERANCE[torch.float32])
    assert all(torch.equal(tensor.grad, before[name]) for name, tensor in tensors.items())


@needs_kernels
def test_step_counters_on_the_device_give_the_same() -> None:
    tensors = _tensors(torch.float32)
    expected = _expected(tensors, steps=2)
    optimizer = _optimizer(tensors, capturable=True)
    for _ in range(2):
        optimizer.step()
    _check(tensors, expected, TOLERANCE[torch.float32])


@needs_kernels
@pytest.mark.parametrize("capturable", [False, True])
def test_kernels_round_stochastically_as_the_reference(capturable: bool) -> None:
    found = []
    for backend in ("triton", "torch"):
        tensors = _tensors(torch.bfloat16)
        optimizer = _optimizer(tensors, rounding="stochastic", seed=3, backend=backend, capturable=capturable)
        optimizer.step()
        found.append(torch.cat([tensor.detach().flatten() for tensor in tensors.values()]))
    ours, reference = found
    nearest = torch.cat([tensor.detach().flatten() for tensor in _stepped("nearest").values()])
    # The last bit of fp32 decides a rounding now and then; nearest rounds every second element the other way.
    assert (ours != reference).double().mean() < 0.01
    assert (ours != nearest).double().mean() > 0.2


def _stepped(rounding: str) -> dict[str, torch.nn.Parameter]:
    tensors = _tensors(torch.bfloat16)
    _optimizer(tensors, rounding=rounding, backend="torch").step()
    return tensors


def test_steps_too_small_for_bf16_arrive_on_average() -> None:
    """Steps of a fortieth of a unit of bf16, which rounding to nearest loses altogether."""
    moved = {}
    for rounding in ("nearest", "stochastic"):
        tensor = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = AdamMini([tensor], roles={tensor: "mlp"}, lr=2.0**-12, rounding=rounding, backend="torch")
        for _ in range(40):
            tensor.grad = torch.ones_like(tensor)
            optimizer.step()
        moved[rounding] = 1 - tensor.detach().double().mean().item()
    assert moved["nearest"] == 0
    assert moved["stochastic"] == pytest.approx(40 * 2.0**-12, rel=0.02)


@needs_kernels
def test_mixed_dtypes() -> None:
    tensors = _tensors(torch.float32)
    for tensor in tensors.values():
        tensor.data = tensor.data.bfloat16()
        tensor.grad = tensor.grad.bfloat16()
    expected = _expected(tensors, steps=2)
    optimizer = _optimizer(tensors, state_dtype=torch.float32)
    for _ in range(2):
        optimizer.step()
    _check(tensors, expected, TOLERANCE[torch.bfloat16])


@needs_kernels
def test_misaligned_views_and_their_neighbours() -> None:
    """A parameter one element into a buffer is updated right, and what lies beside it stays."""
    tensors = {}
    buffers = {}
    for name, (parameter, _) in CASES.items():
        buffers[name] = torch.full((parameter.numel + 2,), float("nan"), device=DEVICE)
        view = buffers[name][1:-1].view(parameter.shape)
        view.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
        tensors[name] = torch.nn.Parameter(view)
    _set_gradients(tensors, torch.Generator().manual_seed(3), torch.float32)
    expected = _expected(tensors, steps=1)
    _optimizer(tensors).step()
    _check(tensors, expected, TOLERANCE[torch.float32])
    assert all(buffer[[0, -1]].isnan().all() for buffer in buffers.values())


@needs_kernels
def test_two_runs_give_the_same_bits() -> None:
    runs = []
    for _ in range(2):
        tensors = _tensors(torch.bfloat16)
        optimizer = _optimizer(tensors)
        optimizer.step()
        runs.append(
            [t.detach() for t in tensors.values()] + [optimizer.state[t]["exp_avg_sq"] for t in tensors.values()]
        )
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
