"""The kernels against the reference from the same state, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from optplan.optim_impls import MicroAdam

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
    for name in ("window_indices", "window_values", "bucket_min", "bucket_max"):
        assert torch.equal(state[name], expected[name]), name
    assert _code_distance(state["error_feedback"], expected["error_feedback"]) <= 1
    # Both sum in fp32; a half unit of the parameter's dtype may tip.
    unit = torch.finfo(ours[0].dtype).eps
    torch.testing.assert_close(ours[0].detach(), theirs[0].detach(), rtol=2 * unit, atol=2e-6)


def _code_distance(a: torch.Tensor, b: torch.Tensor) -> int:
    a, b = a.int(), b.int()
    return int(torch.stack(((a & 15) - (b & 15), (a >> 4) - (b >> 4))).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2048 + 905, {}),
        (1024 + 9, {"block": 1024, "bucket": 32}),
        (4096, {"block": 4096, "bucket": 64, "density": 0.02}),
    ],
)
def test_each_step_equals_the_reference(family: str, size: int, options: dict[str, Any]) -> None:
    ours, theirs = _pair(torch.ones(size, device=DEVICE), lr=0.1, window=2, **options)
    for step in range(3):
        if step:
            _share(ours, theirs)
        for parameter, optimizer in (ours, theirs):
            parameter.grad = torch.from_numpy(gradient(family, size, seed=step)).to(DEVICE)
            optimizer.step()
        _compare(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_selection_is_exact(family: str) -> None:
    (parameter, optimizer), _ = _pair(torch.zeros(2048, device=DEVICE), lr=0.1)
    values = gradient(family, 2048)
    parameter.grad = torch.from_numpy(values).to(DEVICE)
    optimizer.step()
    assert set(optimizer.state[parameter]["window_indices"][:21].tolist()) == largest(values, 21)


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 63, 255, 257, 2047, 2049])
def test_short_blocks(size: int) -> None:
    ours, theirs = _pair(torch.ones(size, device=DEVICE, dtype=torch.bfloat16), lr=0.1, weight_decay=0.1)
    for parameter, optimizer in (ours, theirs):
        values = torch.randn(size, generator=torch.Generator().manual_seed(size))
        parameter.grad = values.to(DEVICE, torch.bfloat16)
        optimizer.step()
    _compare(ours, theirs)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), 1e38])
@pytest.mark.parametrize("place", [77, 2048 + 77])
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


@pytest.mark.parametrize("options", [{"rounding": "stochastic", "seed": 9}, {"bias_correction": "window"}])
def test_options(options: dict[str, Any]) -> None:
    ours, theirs = _pair(torch.ones(2148, device=DEVICE), lr=0.1, window=2, **options)
    for step in range(4):
        if step:
            _share(ours, theirs)
        for parameter, optimizer in (ours, theirs):
            parameter.grad = torch.randn(2148, generator=torch.Generator().manual_seed(step)).to(DEVICE)
            optimizer.step()
        _compare(ours, theirs)


@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5)])
def test_a_scale_is_a_scaled_gradient(scale: Any) -> None:
    (scaled, first), (plain, second) = _pair(torch.zeros(2100, device=DEVICE), lr=0.1, eps=1e-3)
    second.defaults["backend"] = "triton"
    scaled.grad = torch.randn(2100, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    plain.grad = 0.5 * scaled.grad
    first.step(grad_scale=scale)
    second.step()
    assert torch.equal(scaled, plain)


def test_two_runs_are_the_same_bit_by_bit_and_so_is_one_from_a_checkpoint() -> None:
    runs = []
    for reload_after in (None, None, 1):
        parameters = [torch.nn.Parameter(torch.zeros(size, device=DEVICE)) for size in (5, 2300)]
        optimizer = MicroAdam(parameters, lr=0.1, window=2, backend="triton")
        for step in range(3):
            for parameter in parameters:
                values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
                parameter.grad = values.to(DEVICE)
            optimizer.step()
            if step == reload_after:
                saved = optimizer.state_dict()
                optimizer = MicroAdam(parameters, lr=0.1, window=2, backend="triton")
                optimizer.load_state_dict(saved)
        runs.append([t for p in parameters for t in (p.detach(), *optimizer.state[p].values())])
    for others in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], others, strict=True))


def test_only_what_the_window_holds_moves() -> None:
    (parameter, optimizer), _ = _pair(torch.ones(2048, device=DEVICE), lr=0.1)
    parameter.grad = torch.randn(2048, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    optimizer.step()
    moved = (parameter != 1).nonzero().flatten().tolist()
    assert moved == sorted(optimizer.state[parameter]["window_indices"][:21].tolist())
