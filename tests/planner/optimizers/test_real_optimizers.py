"""State bytes and step allocations against the real packages on the CPU, for tensors of odd shapes."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from optplan.planner.optimizers.base import OptimizerContext
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.tensors import Parameter, Role

torch = import_module("torch")

ODD_SHAPES: list[tuple[int, ...]] = [
    (1,), (63,), (255,), (4095,), (4096,), (4097,), (), (37, 5), (1, 9), (129, 63), (64, 257), (3, 7, 5), (2, 3, 5, 7),
]  # fmt: skip
EMPTY_SHAPES: list[tuple[int, ...]] = [(0,), (0, 5)]
MATRICES: list[tuple[int, ...]] = [(37, 5), (1, 9), (129, 63), (64, 257), (8, 8)]


def _adamw(**flags: bool) -> Any:
    return lambda params: torch.optim.AdamW(params, weight_decay=0.1, **flags)


def _sgd(*, momentum: float = 0.9, **flags: Any) -> Any:
    return lambda params: torch.optim.SGD(params, lr=0.1, momentum=momentum, **flags)


def _torch_adafactor(**flags: bool) -> Any:
    return lambda params: torch.optim.Adafactor(params, **flags)


def _hf_adafactor(beta1: float | None) -> Any:
    def build(params: Any) -> Any:
        module = import_module("transformers.optimization")
        settings = {"lr": 1e-3, "scale_parameter": False, "relative_step": False, "weight_decay": 0.1}
        return module.Adafactor(params, beta1=beta1, **settings)

    return build


def _lion(foreach: bool) -> Any:
    return lambda params: import_module("pytorch_optimizer").Lion(params, foreach=foreach, weight_decay=0.1)


def _muon(nesterov: bool) -> Any:
    return lambda params: torch.optim.Muon(params, nesterov=nesterov)


ALL = [*ODD_SHAPES, *EMPTY_SHAPES]
FOREACH, FOR_LOOP = {"implementation": "foreach"}, {"implementation": "for-loop"}
HF = {"implementation": "transformers"}
AMSGRAD, DECAY, NESTEROV = {"amsgrad": "true"}, {"weight_decay": "0.1"}, {"nesterov": "true"}
CASES = [
    ("adamw", {}, _adamw(fused=True), ALL),
    ("adamw", AMSGRAD, _adamw(fused=True, amsgrad=True), ALL),
    ("adamw", FOREACH, _adamw(foreach=True), ALL),
    ("adamw", FOREACH | AMSGRAD, _adamw(foreach=True, amsgrad=True), ALL),
    ("adamw", FOR_LOOP, _adamw(foreach=False), ALL),
    ("adamw", FOR_LOOP | AMSGRAD, _adamw(foreach=False, amsgrad=True), ALL),
    ("sgd", {}, _sgd(fused=True), ALL),
    ("sgd", {"momentum": "0"}, _sgd(fused=True, momentum=0), ALL),
    ("sgd", FOREACH, _sgd(foreach=True), ALL),
    ("sgd", FOREACH | NESTEROV, _sgd(foreach=True, nesterov=True), ALL),
    ("sgd", FOREACH | DECAY, _sgd(foreach=True, weight_decay=0.1), ALL),
    ("sgd", FOR_LOOP, _sgd(foreach=False), ALL),
    ("sgd", FOR_LOOP | DECAY | {"momentum": "0"}, _sgd(foreach=False, momentum=0, weight_decay=0.1), ALL),
    ("sgd", FOR_LOOP | DECAY, _sgd(foreach=False, weight_decay=0.1), ALL),
    ("sgd", FOR_LOOP | NESTEROV, _sgd(foreach=False, nesterov=True), ALL),
    ("sgd", FOR_LOOP | DECAY | NESTEROV, _sgd(foreach=False, nesterov=True, weight_decay=0.1), ALL),
    ("adafactor", {}, _torch_adafactor(), ODD_SHAPES),
    ("adafactor", {"foreach": "true"}, _torch_adafactor(foreach=True), ODD_SHAPES),
    ("adafactor", HF, _hf_adafactor(None), ALL),
    ("adafactor", HF | {"beta1": "0.9"}, _hf_adafactor(0.9), ALL),
    ("adafactor", HF | {"beta1": "0"}, _hf_adafactor(0.0), ALL),
    ("lion", {}, _lion(True), ALL),
    ("lion", {"foreach": "false"}, _lion(False), ALL),
    ("muon", {}, _muon(True), MATRICES),
    ("muon", {"nesterov": "false"}, _muon(False), MATRICES),
]
IDS = ["-".join([name, *(f"{key}={value}" for key, value in options.items())]) for name, options, _, _ in CASES]


def _parameters(shapes: list[tuple[int, ...]], role: Role = "mlp") -> list[Parameter]:
    return [Parameter(f"p{number}", shape, role, "linear") for number, shape in enumerate(shapes)]


def _tensors(shapes: list[tuple[int, ...]], dtype: str) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    kind = getattr(torch, dtype)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(kind)) for shape in shapes]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "options", "real", "shapes"), CASES, ids=IDS)
def test_state_and_step_equal_the_real_optimizer(
    name: str,
    options: dict[str, str],
    real: Any,
    shapes: Any,
    dtype: Any,
    state_bytes: Any,
    real_events: Any,
    model_events: Any,
) -> None:
    parameters, tensors = _parameters(shapes), _tensors(shapes, dtype)
    model = build_optimizer(name, options).bind(parameters)
    context = OptimizerContext(dtype, dtype)
    assert model.unsupported_reason(parameters, context) is None

    optimizer = real(tensors)
    assert model_events(model, parameters, context) == real_events(optimizer, tensors)
    for parameter, tensor in zip(parameters, tensors, strict=True):
        said = {state.name: state.num_bytes for state in model.state(parameter, context)}
        assert said == state_bytes(optimizer, tensor), parameter.shape


def test_fused_adamw_keeps_its_step_counters_with_the_parameter_and_the_others_on_the_host() -> None:
    context, parameter = OptimizerContext("float32", "float32"), Parameter("w", (2, 3), "mlp", "linear")
    devices = {
        kind: build_optimizer("adamw", {"implementation": kind}).state(parameter, context)[0].device
        for kind in ("fused", "foreach", "for-loop", "optplan")
    }
    assert devices == {"fused": "device", "foreach": "cpu", "for-loop": "cpu", "optplan": "cpu"}


def test_torch_adafactor_is_refused_on_an_empty_tensor_as_torch_fails_on_it() -> None:
    parameters, context = _parameters([(3, 4), (0, 5)]), OptimizerContext("float32", "float32")
    reason = build_optimizer("adafactor").unsupported_reason(parameters, context)
    assert reason == "torch's Adafactor divides by zero on the empty tensor p1"
    tensors = _tensors([(0, 5)], "float32")
    tensors[0].grad = torch.zeros(0, 5)
    with pytest.raises(ZeroDivisionError):
        torch.optim.Adafactor(tensors).step()
