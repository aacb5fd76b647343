"""The kernels against the reference from the same state, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from optplan.optim_impls import MicroAdam
from optplan.optim_impls.micro_adam.optimizer import STATE_NAMES

_cases = runpy.run_path(str(Path(__file__).with_name("micro_cases.py")))
FAMILIES, gradient, largest = _cases["FAMILIES"], _cases["gradient"], _cases["largest"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _pair(start: torch.Tensor, **options: Any) -> list[tuple[torch.nn.Parameter, MicroAdam]]:
    parameters = [torch.nn.Parameter(start.detach().clone()) for _ in range(2)]
    backends = ("triton", "torch")
    return [(p, MicroAdam([p], backend=b, **options)) for p, b in zip(parameters, backends, strict=True)]


def _share(ours: tuple[torch.nn.Parameter, MicroAdam], theirs: tuple[torch.nn.Parameter, MicroAdam]) -> None:
    """Give the reference what the kernels have, so that each step is judged alone."""
    theirs[1].load_state_dict(ours[1].state_dict())
    with torch.no_grad():
        theirs[0].copy_(ours[0])


def _compare(ours: tuple[torch.nn.Parameter, MicroAdam], theirs: tuple[torch.nn.Parameter, MicroAdam]) -> None:
    state, expected = ours[1].state[ours[0]], theirs[1].state[theirs[0]]
    for name in STATE_NAMES:
        assert torch.equal(state[name], expected[name]), name
    # Both sum in fp32; a half unit of the parameter's dtype may tip.
    unit = torch.finfo(ours[0].dtype).eps
    torch.testing.assert_close(ours[0].detach(), theirs[0].detach(), rtol=2 * unit, atol=2e-6)


_LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2048, {}),
    (905, {}),
    (1024 + 9, {"block": 1024, "bucket": 32}),
    (4096, {"block": 4096, "bucket": 128, "density": 0.02}),
]
# The interpreter takes seconds for each; a GPU tries all.
_CASES = [
    (family, *layout)
    for number, layout in enumerate(_LAYOUTS)
    for family in (FAMILIES if DEVICE == "cuda" or number == 0 else ("ternary",))
]


@pytest.mark.parametrize(("family", "size", "options"), _CASES)
def test_each_step_equals_the_reference(family: str, size: int, options: dict[str, Any]) -> None:
    ours, theirs = _pair(torch.ones(size, device=DEVICE), lr=0.1, window=2, **options)
    for step in range(2 if DEVICE == "cpu" else 5):
        if step:
            _share(ours, theirs)
        for parameter, optimizer in (ours, theirs):
            parameter.grad = torch.from_numpy(gradient(family, size, seed=step)).to(DEVICE)
            optimizer.step()
        _compare(ours, theirs)


@pytest.mark.parametrize("family", ["gaussian", "ternary", "subnormal"] if DEVICE == "cpu" else FAMILIES)
def test_the_first_selection_is_exact(family: str) -> None:
    (parameter, optimizer), _ = _pair(torch.zeros(2048, device=DEVICE), lr=0.1)
    values = torch.from_numpy(gradient(family, 2048)).to(torch.bfloat16).float()
    parameter.grad = values.to(DEVICE)
    optimizer.step()
    assert set(optimizer.state[parameter]["window_indices"][:21].tolist()) == largest(values.numpy(), 21)


@pytest.mark.parametrize("size", [1, 9, 255, 2049])
def test_short_blocks(size: int) -> None:
    ours, theirs = _pair(torch.ones(size, device=DEVICE, dtype=torch.bfloat16), lr=0.1, weight_decay=0.1)
    for parameter, optimizer in (ours, theirs):
        values = torch.randn(size, generator=torch.Generator().manual_seed(size))
        parameter.grad = values.to(DEVICE, torch.bfloat16)
        optimizer.step()
    _compare(ours, theirs)


@pytest.mark.parametrize(("bad", "place"), [(float("nan"), 77), (1e38, 77), (float("-inf"), 2048 + 77)])
def test_blocks_that_are_not_finite_sit_out(bad: float, place: int) -> None:
    ours, theirs = _pair(torch.ones(2048 + 300, device=DEVICE), lr=0.1, weight_decay=0.1)
    for step in range(3):
        if step:
            _share(ours, theirs)
        for parameter, optimizer in (ours, theirs):
            values = torch.randn(2348, generator=torch.Generator().manual_seed(step))
            values[place] = bad if step == 1 else 0.0
            parameter.grad = values.to(DEVICE)
            optimizer.step()
        _compare(ours, theirs)
    assert ours[0].isfinite().all()


@pytest.mark.parametrize(
    ("size", "dtype", "num_steps", "options"),
    [
        (300, torch.float32, 4, {"rounding": "stochastic", "seed": 9}),
        (300, torch.float32, 4, {"bias_correction": "window"}),
        (300, torch.float32, 2, {"bias_correction": "window", "capturable": True, "weight_decay": 0.1}),
        (300, torch.float32, 2, {"alpha": 0.25, "weight_decay": 0.1}),
        (256 + 7, torch.bfloat16, 2, {"alpha": 0.1, "rounding": "stochastic", "block": 256, "bucket": 16}),
        (512, torch.float16, 2, {"alpha": 0.1, "capturable": True, "block": 512, "bucket": 64}),
    ],
)
def test_options(size: int, dtype: torch.dtype, num_steps: int, options: dict[str, Any]) -> None:
    ours, theirs = _pair(torch.ones(size, device=DEVICE, dtype=dtype), lr=0.1, window=2, **options)
    for step in range(num_steps):
        if step:
            _share(ours, theirs)
        for parameter, optimizer in (ours, theirs):
            gradient = torch.randn(size, generator=torch.Generator().manual_seed(step))
            parameter.grad = gradient.to(DEVICE, dtype)
            optimizer.step()
        _compare(ours, theirs)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_an_eps_of_zero_leaves_alone_what_has_no_gradient(backend: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(64, device=DEVICE))
    optimizer = MicroAdam([parameter], lr=0.5, eps=0.0, density=0.0625, backend=backend)
    parameter.grad = torch.zeros_like(parameter)
    parameter.grad[9] = 3.0
    optimizer.step()
    assert parameter[9].item() == 0.5
    assert parameter.sum().item() == 63.5


@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5)])
def test_a_scale_is_a_scaled_gradient(scale: Any) -> None:
    (scaled, first), (plain, second) = _pair(torch.zeros(300, device=DEVICE), lr=0.1, eps=1e-3)
    second.defaults["backend"] = "triton"
    scaled.grad = torch.randn(300, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    plain.grad = 0.5 * scaled.grad
    first.step(grad_scale=scale)
    second.step()
    assert torch.equal(scaled, plain)


def test_two_runs_are_the_same_bit_by_bit_and_so_is_one_from_a_checkpoint() -> None:
    runs = []
    for reload_after in (None, None, 0):
        parameter = torch.nn.Parameter(torch.zeros(300, device=DEVICE))
        optimizer = MicroAdam([parameter], lr=0.1, window=2, backend="triton")
        for step in range(2):
            parameter.grad = torch.randn(300, generator=torch.Generator().manual_seed(step)).to(DEVICE)
            optimizer.step()
            if step == reload_after:
                saved = optimizer.state_dict()
                optimizer = MicroAdam([parameter], lr=0.1, window=2, backend="triton")
                optimizer.load_state_dict(saved)
        runs.append([parameter.detach(), *optimizer.state[parameter].values()])
    for others in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], others, strict=True))


def test_only_what_the_window_holds_moves() -> None:
    (parameter, optimizer), _ = _pair(torch.ones(2048, device=DEVICE), lr=0.1)
    parameter.grad = torch.randn(2048, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    optimizer.step()
    moved = (parameter != 1).nonzero().flatten().tolist()
    assert moved == sorted(optimizer.state[parameter]["window_indices"][:21].tolist())


def test_another_dtype_of_the_learning_rate_binds_another_kernel() -> None:
    from optplan.optim_impls.adamw.launcher import AdamWLaunch
    from optplan.optim_impls.micro_adam.launcher import MicroAdamLaunch, update_kernel
    from optplan.optim_impls.micro_adam.layout import layout_of

    rows = [[torch.zeros(64, device=DEVICE)] * 8]
    layout = layout_of(64, block=256, bucket=8, window=2, density=0.01)
    micro_adam = MicroAdamLaunch(rows, [0], layout=layout, aligned=True, capturable=True)
    dtypes = (None, torch.float32, torch.float64)
    assert len({id(micro_adam._kernel(update_kernel, 1, {"FULL": True}, dtype)) for dtype in dtypes * 2}) == 3
    adamw = AdamWLaunch.__new__(AdamWLaunch)
    adamw._bound, adamw._num_programs, adamw._constants = {}, 1, {}
    assert len({id(adamw._kernel("nearest", False, dtype)) for dtype in dtypes * 2}) == 3
