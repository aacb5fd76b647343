"""Gradients that are zero, not finite or laid out otherwise, tensors without elements; in both modes and backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optplan.optim_impls import Adapprox

MODES = [("torch", {"rank": 4}), ("triton", {"rank": 4}), ("torch", {"rank": 4, "mode": "paper"})]
modes = pytest.mark.parametrize(("backend", "options"), MODES, ids=["torch", "kernels", "paper"])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(20, 24), (2, 3, 5, 5), (70,), (20, 24)]


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _trained(gradients: list[list[torch.Tensor]], backend: str, **options: Any) -> tuple[Any, Adapprox]:
    """Parameters of ones after a step with each list of gradients."""
    parameters = [torch.nn.Parameter(torch.ones_like(gradient)) for gradient in gradients[0]]
    optimizer = Adapprox(parameters, lr=0.1, backend=backend, **options)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return [parameter.detach() for parameter in parameters], optimizer


@modes
@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), torch.float32), (float("inf"), torch.bfloat16)])
def test_a_gradient_that_is_not_finite_shows_in_all_weights_of_its_tensor_and_in_no_other(
    backend: str, options: dict[str, Any], value: float, dtype: torch.dtype
) -> None:
    clean = [[_random(*shape, seed=10 * step + i).to(dtype) for i, shape in enumerate(SHAPES)] for step in range(2)]
    spoilt = [list(step) for step in clean]
    for place in (0, 2):
        spoilt[1][place] = clean[1][place].clone()
        spoilt[1][place].view(-1)[7] = value
    expected, _ = _trained(clean, backend, **options)
    found, _ = _trained(spoilt, backend, **options)
    assert [bool(tensor.isnan().all()) for tensor in found] == [True, False, True, False]
    for place in (1, 3):
        assert torch.equal(found[place], expected[place])


@modes
def test_without_gradients_the_weights_decay_and_the_factors_stay_empty(backend: str, options: dict[str, Any]) -> None:
    zeros = [torch.zeros(shape, device=DEVICE) for shape in SHAPES]
    found, optimizer = _trained([zeros, zeros], backend, weight_decay=0.5, **options)
    for tensor, state in zip(found, optimizer.state.values(), strict=True):
        torch.testing.assert_close(tensor, torch.full_like(tensor, (1 - 0.1 * 0.5) ** 2))
        moment = state["u_factor"] if "u_factor" in state else state["exp_avg_sq"]
        assert not moment.any()
        assert not state["exp_avg"].any()


@modes
def test_a_convolution_s_memory_format_changes_nothing(backend: str, options: dict[str, Any]) -> None:
    grads = [_random(8, 3, 4, 5, seed=step) for step in range(2)]
    plain, _ = _trained([[g] for g in grads], "torch", **options)
    weights = torch.nn.Parameter(torch.ones(8, 3, 4, 5, device=DEVICE).to(memory_format=torch.channels_last))
    optimizer = Adapprox([weights], lr=0.1, backend=backend, **options)
    for grad in grads:
        weights.grad = grad.to(memory_format=torch.channels_last)
        optimizer.step()
    assert weights.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(weights.detach().contiguous(), plain[0])


@modes
def test_a_rank_above_a_quarter_of_the_smaller_side_is_cut_to_it(backend: str, options: dict[str, Any]) -> None:
    grads = [[_random(20, 24, seed=step)] for step in range(2)]
    cut, optimizer = _trained(grads, backend, **(options | {"rank": 1000}))
    exact, _ = _trained(grads, backend, **(options | {"rank": 5}))
    assert torch.equal(cut[0], exact[0])
    (state,) = optimizer.state.values()
    assert (state["q_factor"].shape, state["u_factor"].shape) == ((20, 5), (24, 5))


@modes
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (3, 0, 2)])
def test_tensors_without_elements_take_part(backend: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    _, optimizer = _trained([[torch.zeros(shape, device=DEVICE)]] * 2, backend, **options)
    (state,) = optimizer.state.values()
    assert {name: value.numel() for name, value in state.items() if name != "step"} == {"exp_avg": 0, "exp_avg_sq": 0}
    assert float(state["step"]) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rate_on_the_device_is_a_rate_on_the_host_to_the_bit(dtype: torch.dtype) -> None:
    """Also where it changes its dtype from one step to the next."""
    grads = [[_random(*shape, seed=10 * step + i) for i, shape in enumerate(SHAPES[:3])] for step in range(2)]
    expected, _ = _trained(grads, "triton", rank=4)
    parameters = [torch.nn.Parameter(torch.ones_like(gradient)) for gradient in grads[0]]
    optimizer = Adapprox(parameters, lr=torch.tensor(0.1, device=DEVICE), rank=4, backend="triton", capturable=True)
    for step in grads:
        for parameter, gradient in zip(parameters, step, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient.clone()
            parameter.grad.copy_(gradient)
        optimizer.step()
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1, dtype=dtype, device=DEVICE)
    for found, exact in zip(parameters, expected, strict=True):
        assert torch.equal(found, exact)


def test_the_device_tells_as_the_host_does_which_steps_iterate_twice() -> None:
    """The first, the eighth and the ninth, to the bit."""
    grads = [[_random(20, 24, seed=step)] for step in range(3)]
    found = []
    for capturable in (False, True):
        parameters = [torch.nn.Parameter(torch.ones_like(gradient)) for gradient in grads[0]]
        optimizer = Adapprox(parameters, lr=0.1, rank=4, backend="triton", capturable=capturable)
        for number, step in enumerate(grads):
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
            if not number:
                for parameter in parameters:
                    optimizer.state[parameter]["step"].fill_(7)
        found.append([value for p in parameters for value in optimizer.state[p].values()] + parameters)
    for host, device in zip(*found, strict=True):
        assert torch.equal(host.cpu(), device.cpu())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_only_the_first_eight_steps_iterate_twice(backend: str) -> None:
    """A second iteration brings the factors of one gradient's square nearer to it than one iteration does."""
    errors = []
    for steps_before in (0, 7, 8):
        parameter = torch.nn.Parameter(torch.zeros(48, 64, device=DEVICE))
        optimizer = Adapprox([parameter], rank=4, backend=backend)
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.state[parameter]["step"].fill_(steps_before)
        parameter.grad = _random(48, 64, seed=1)
        optimizer.step()
        state, exact = optimizer.state[parameter], 0.001 * parameter.grad.double().square()
        errors.append(float((exact - state["q_factor"].double() @ state["u_factor"].double().mT).norm() / exact.norm()))
    assert errors[0] == errors[1] < 0.97 * errors[2]
