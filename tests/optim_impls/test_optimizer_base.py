"""The contract that all optimizers share, on AdamW."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from optplan.optim_impls import AdamW


def _parameter(*shape: int, **options: Any) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(shape, **options))


def _step(optimizer: torch.optim.Optimizer, *parameters: torch.nn.Parameter) -> None:
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


BAD_ARGUMENTS = [
    ({"lr": -1.0}, "lr must be >= 0, got -1.0"),
    ({"lr": float("nan")}, "lr must be >= 0, got nan"),
    ({"eps": -1e-8}, "eps must be >= 0, got -1e-08"),
    ({"weight_decay": -0.1}, "weight_decay must be >= 0, got -0.1"),
    ({"betas": (1.0, 0.999)}, "beta1 must be >= 0 and < 1, got 1.0"),
    ({"betas": (0.9, -0.5)}, "beta2 must be >= 0 and < 1, got -0.5"),
    ({"betas": (0.9,)}, "betas must be two numbers, got (0.9,)"),
    ({"backend": "cuda"}, "backend must be one of auto, triton, torch; got cuda"),
    ({"rounding": "up"}, "rounding must be one of nearest, stochastic, kahan; got up"),
    ({"state_dtype": torch.int8}, "state_dtype must be one of None, torch.float32, torch.bfloat16; got torch.int8"),
]


@pytest.mark.parametrize(("options", "message"), BAD_ARGUMENTS)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        AdamW([_parameter(3)], **options)
    assert str(caught.value) == message


def test_a_group_is_checked_like_the_defaults() -> None:
    optimizer = AdamW([_parameter(3)])
    with pytest.raises(ValueError) as caught:
        optimizer.add_param_group({"params": [_parameter(2)], "lr": -2.0})
    assert str(caught.value) == "lr must be >= 0, got -2.0"
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_only_real_floating_point_parameters(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError) as caught:
        AdamW([torch.ones(3, dtype=dtype)])
    assert str(caught.value) == f"AdamW needs real floating-point parameters, got {dtype}"


def test_sparse_gradients_are_refused() -> None:
    parameter = _parameter(3)
    parameter.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError) as caught:
        AdamW([parameter]).step()
    assert str(caught.value) == "AdamW does not support sparse gradients"


def test_a_sparse_gradient_after_a_dense_one_is_refused() -> None:
    parameter = _parameter(3)
    optimizer = AdamW([parameter])
    _step(optimizer, parameter)
    parameter.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    assert str(caught.value) == "AdamW does not support sparse gradients"


def test_scale_must_be_a_scalar() -> None:
    parameter = _parameter(3)
    parameter.grad = torch.ones(3)
    with pytest.raises(ValueError) as caught:
        AdamW([parameter]).step(grad_scale=torch.ones(2))
    assert str(caught.value) == "grad_scale must be a scalar, got shape (2,)"


def test_triton_needs_a_device_to_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    parameter = _parameter(3)
    parameter.grad = torch.ones(3)
    with pytest.raises(ValueError) as caught:
        AdamW([parameter], backend="triton").step()
    message = "backend='triton' needs parameters on a CUDA device or TRITON_INTERPRET=1, got a cpu tensor"
    assert str(caught.value) == message


def test_closure_runs_with_gradients_and_its_loss_returns() -> None:
    parameter = _parameter(3)
    optimizer = AdamW([parameter], lr=0.5, weight_decay=0.0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = parameter.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3.0
    torch.testing.assert_close(parameter.detach(), torch.full((3,), 0.5))


def test_nothing_to_do() -> None:
    without, empty = _parameter(3), _parameter(0)
    empty.grad = torch.ones(0)
    optimizer = AdamW([{"params": []}, {"params": [without, empty]}])
    assert optimizer.step() is None
    assert torch.equal(without, torch.ones(3))
    assert without not in optimizer.state


def test_groups_added_later_and_parameters_that_rest_count_their_own_steps() -> None:
    first, second, third = _parameter(3), _parameter(4), _parameter(5)
    optimizer = AdamW([first, second])
    _step(optimizer, first, second)
    second.grad = None
    _step(optimizer, first)
    optimizer.add_param_group({"params": third, "lr": 0.1})
    _step(optimizer, first, second, third)
    assert [int(optimizer.state[p]["step"]) for p in (first, second, third)] == [3, 2, 1]


def test_step_counters_are_scalars_on_the_host() -> None:
    parameter = _parameter(3)
    optimizer = AdamW([parameter])
    _step(optimizer, parameter)
    step = optimizer.state[parameter]["step"]
    assert (step.shape, step.dtype, step.device.type) == ((), torch.float32, "cpu")


def test_a_counter_that_is_written_to_is_heeded() -> None:
    ours, theirs = [_parameter(3), _parameter(4)], [_parameter(3), _parameter(4)]
    for parameters, optimizer in ((ours, AdamW(ours)), (theirs, torch.optim.AdamW(theirs))):
        for _ in range(3):
            _step(optimizer, *parameters)
        optimizer.state[parameters[1]]["step"].fill_(0)
        optimizer.state[parameters[0]]["exp_avg"] = torch.zeros(3)
        _step(optimizer, *parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def _scale_counter(optimizer: AdamW, parameter: torch.Tensor) -> None:
    optimizer.state[parameter]["step"].add_(7)


def _replace_moment(optimizer: AdamW, parameter: torch.Tensor) -> None:
    optimizer.state[parameter]["exp_avg"] = torch.ones_like(parameter)


def _move_moment(optimizer: AdamW, parameter: torch.Tensor) -> None:
    moment = optimizer.state[parameter]["exp_avg_sq"]
    moment.data = moment.data.clone().mul_(3)


def _replace_state(optimizer: AdamW, parameter: torch.Tensor) -> None:
    optimizer.state[parameter] = {name: value.clone() * 2 for name, value in optimizer.state[parameter].items()}


def _forget_state(optimizer: AdamW, parameter: torch.Tensor) -> None:
    del optimizer.state[parameter]


def _move_parameter(optimizer: AdamW, parameter: torch.Tensor) -> None:
    parameter.data = parameter.data.clone().neg_()


@pytest.mark.parametrize(
    "meddle", [_scale_counter, _replace_moment, _move_moment, _replace_state, _forget_state, _move_parameter]
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_others_change_between_steps_is_heeded(meddle: Callable[..., None], backend: str) -> None:
    """An optimizer that has planned its steps goes on as one that plans them for the first time."""
    results = []
    for planned in (True, False):
        parameter = _parameter(5)
        optimizer = AdamW([parameter], lr=0.1, backend=backend)
        for _ in range(2):
            _step(optimizer, parameter)
        meddle(optimizer, parameter)
        if not planned:
            optimizer._reset_caches()
        _step(optimizer, parameter)
        results.append((parameter.detach(), dict(optimizer.state[parameter])))
    (ours, our_state), (fresh, fresh_state) = results
    assert torch.equal(ours, fresh)
    assert all(torch.equal(our_state[name], value) for name, value in fresh_state.items())


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_parameters_over_the_same_memory_follow_each_other(backend: str) -> None:
    results = []
    for cls, options in ((AdamW, {"backend": backend}), (torch.optim.AdamW, {"foreach": False})):
        shared = torch.ones(2000)
        parameters = [torch.nn.Parameter(shared), torch.nn.Parameter(shared)]
        optimizer = cls(parameters, lr=0.1, **options)
        _step(optimizer, *parameters)
        results.append(shared)
    torch.testing.assert_close(results[0], results[1])


def test_gradients_of_another_layout_than_the_parameter() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = _parameter(33, 40), _parameter(33, 40)
    for parameter, optimizer in ((ours, AdamW([ours])), (theirs, torch.optim.AdamW([theirs]))):
        generator.manual_seed(0)
        for transposed in (False, True, False):
            gradient = torch.randn(33, 40, generator=generator)
            parameter.grad = gradient.t().contiguous().t() if transposed else gradient
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_state_keeps_its_dtype_through_a_load(dtype: torch.dtype) -> None:
    parameter = _parameter(5, dtype=dtype)
    optimizer = AdamW([parameter], state_dtype=torch.float32)
    _step(optimizer, parameter)
    optimizer.state[parameter]["exp_avg_sq"].fill_(1 + 2**-20)
    other = AdamW([parameter], state_dtype=torch.float32)
    other.load_state_dict(optimizer.state_dict())
    loaded = other.state[parameter]["exp_avg_sq"]
    assert loaded.dtype == torch.float32
    assert loaded.tolist() == [1 + 2**-20] * 5
    assert loaded.data_ptr() != optimizer.state[parameter]["exp_avg_sq"].data_ptr()


def test_hooks_see_tensors_and_may_replace_the_state() -> None:
    parameter = _parameter(2)
    optimizer = AdamW([parameter])
    _step(optimizer, parameter)

    def double(_: Any, loaded: dict[str, Any]) -> dict[str, Any]:
        state = {key: {**value, "exp_avg": value["exp_avg"] * 2} for key, value in loaded["state"].items()}
        return {**loaded, "state": state}

    other = AdamW([parameter])
    other.register_load_state_dict_pre_hook(double)
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.state[parameter]["exp_avg"], 2 * optimizer.state[parameter]["exp_avg"])


def test_backend_and_capturable_stay_through_a_load() -> None:
    parameter = _parameter(2)
    source, target = AdamW([parameter], backend="triton"), AdamW([parameter], backend="torch", capturable=True)
    target.load_state_dict(source.state_dict())
    assert (target.param_groups[0]["backend"], target.param_groups[0]["capturable"]) == ("torch", True)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_alone(copied: Callable[[Any], Any]) -> None:
    parameter = _parameter(4)
    optimizer = AdamW([parameter], backend="torch")
    _step(optimizer, parameter)
    other = copied(optimizer)
    twin = other.param_groups[0]["params"][0]
    _step(other, twin)
    assert int(optimizer.state[parameter]["step"]) == 1
    _step(optimizer, parameter)
    assert torch.equal(parameter, twin)
    assert int(other.state[twin]["step"]) == int(optimizer.state[parameter]["step"]) == 2


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    parameter = _parameter(4)
    _step(AdamW([parameter]), parameter)
    assert capfd.readouterr() == ("", "")


def test_classes_are_imported_when_they_are_asked_for() -> None:
    code = "import sys, optplan.optim_impls as o; assert 'torch' not in sys.modules; assert 'AdamW' in dir(o); o.SGD"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    message = "AttributeError: module 'optplan.optim_impls' has no attribute 'SGD'"
    assert result.stderr.strip().splitlines()[-1] == message
