"""The class: its arguments, its state, checkpoints, and what the planner says of it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from optplan.optim_impls import MicroAdam
from optplan.optim_impls.micro_adam.optimizer import _computes_in_bf16
from optplan.optim_impls.optimizer_base import Part
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.tensors import Parameter

SHAPES = ((1,), (63,), (255,), (2048,), (4097,), (37, 101), (3, 5, 7), (), (0,), (2050, 3))


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"weight_decay": 0.1}),
        (torch.float16, {"rounding": "stochastic", "seed": 5}),
        (torch.float32, {"bias_correction": "window", "window": 3, "density": 0.02, "block": 1024, "bucket": 32}),
    ],
)
def test_matrix(check_matrix: Callable[..., None], dtype: torch.dtype, options: dict[str, Any]) -> None:
    # On a GPU with the kernels; the interpreter would take a minute, so it has its own smaller tests.
    backend = "triton" if torch.cuda.is_available() else "torch"
    check_matrix(lambda p, b: MicroAdam(p, lr=0.05, backend=b, **options), dtype=dtype, backend=backend)


@pytest.mark.parametrize("options", [{}, {"block": 4096, "bucket": 128, "density": 0.03, "window": 4}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_what_the_planner_says(
    check_planner: Callable[..., None], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    parameters = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in SHAPES]
    optimizer = MicroAdam(parameters, backend="torch", **options)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    described = [Parameter(f"p{i}", shape, "other", "linear") for i, shape in enumerate(SHAPES)]
    check_planner(optimizer, build_optimizer("micro-adam", options), described)


def test_a_checkpoint_in_the_middle_of_the_window_keeps_every_bit() -> None:
    start = torch.randn(5000, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    parameter = torch.nn.Parameter(start)
    optimizer = MicroAdam([parameter], backend="torch")
    for seed in range(13):  # the window's row 3 comes next
        parameter.grad = torch.randn(5000, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
        optimizer.step()
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    fresh = MicroAdam([parameter], backend="torch")
    fresh.load_state_dict(torch.load(saved, weights_only=True))
    ours, theirs = optimizer.state[parameter], fresh.state[parameter]
    assert {name: value.dtype for name, value in theirs.items()} == {
        "step": torch.float32,
        "error_feedback": torch.uint8,
        "bucket_min": torch.bfloat16,
        "bucket_max": torch.bfloat16,
        "window_indices": torch.int16,
        "window_values": torch.bfloat16,
    }
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_scale_is_a_scaled_gradient() -> None:
    moved = []
    for scale, factor in ((0.25, 1.0), (torch.tensor(0.25), 1.0), (None, 0.25)):
        parameter = torch.nn.Parameter(torch.zeros(3000))
        optimizer = MicroAdam([parameter], lr=0.1, eps=1e-3, backend="torch")
        for seed in range(3):
            parameter.grad = factor * torch.randn(3000, generator=torch.Generator().manual_seed(seed))
            optimizer.step(grad_scale=scale)
        moved.append(parameter.detach())
    assert torch.equal(moved[0], moved[2])
    assert torch.equal(moved[1], moved[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be >= 0, got -1.0"),
        ({"betas": (0.9, 1.0)}, "beta2 must be >= 0 and < 1, got 1.0"),
        ({"density": 0.0}, "density must be above 0 and at most 1, got 0.0"),
        ({"window": 0}, "window must be an integer from 1 to 1000, got 0"),
        ({"window": True}, "window must be an integer from 1 to 1000, got True"),
        ({"block": 40000}, "block must be an integer from 64 to 32768, got 40000"),
        ({"bucket": 12}, "bucket must be a multiple of 8 and divide block=2048, got 12"),
        ({"bucket": 96}, "bucket must be a multiple of 8 and divide block=2048, got 96"),
        ({"rounding": "up"}, "rounding must be one of nearest, stochastic; got up"),
        ({"bias_correction": "none"}, "bias_correction must be one of full, window; got none"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        MicroAdam([torch.nn.Parameter(torch.zeros(3))], **options)
    assert str(error.value) == message


def test_a_block_that_is_no_power_of_two_runs_on_the_reference() -> None:
    moved = []
    for backend in ("auto", "torch"):
        parameter = torch.nn.Parameter(torch.zeros(3000))
        optimizer = MicroAdam([parameter], lr=0.1, block=2400, bucket=48, backend=backend)
        parameter.grad = torch.randn(3000, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        moved.append(parameter.detach())
    assert torch.equal(*moved)
    assert moved[0].count_nonzero() == 24 + 6


@pytest.mark.parametrize(("shift", "taken"), [(0, True), (4, True), (2, False), (1, False)])
def test_the_kernels_take_codes_that_begin_at_a_word(
    monkeypatch: pytest.MonkeyPatch, shift: int, *, taken: bool
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    parameter = torch.nn.Parameter(torch.zeros(64))
    optimizer = MicroAdam([parameter], lr=0.1)
    parameter.grad = torch.ones(64)
    optimizer._fill(optimizer.state[parameter], parameter, optimizer.param_groups[0])
    codes = optimizer.state[parameter]["error_feedback"]
    optimizer.state[parameter]["error_feedback"] = torch.zeros(len(codes) + 4, dtype=torch.uint8)[shift:][: len(codes)]
    (batch,) = optimizer._divide([Part(parameter, optimizer.state[parameter], 0)], [])
    assert batch.triton is taken


@pytest.mark.parametrize(("capability", "taken"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_the_kernels_need_a_gpu_with_bfloat16_arithmetic(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], *, taken: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert _computes_in_bf16(torch.device("cuda", 0)) is taken
