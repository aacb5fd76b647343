"""State and step of the quantized, low-rank and factored optimizers against the real packages on the CPU."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from optplan.planner.optimizers.base import OptimizerContext
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.tensors import Parameter

torch = import_module("torch")

SHAPES: list[tuple[int, ...]] = [(1,), (255,), (4095,), (4096,), (4160,), (37, 100), (100, 37), (64, 64), (64, 257)]
DEEP: list[tuple[int, ...]] = [(), (3, 7, 5), (2, 3, 5, 7)]
QUANTIZED: list[tuple[int, ...]] = [*SHAPES, (0, 5), (4097,), (4224,), (2, 48, 64)]
MATRICES: list[tuple[int, ...]] = [(37, 100), (100, 37), (64, 64), (257, 64)]
VECTORS: list[tuple[int, ...]] = [(255,), (4096,), (3,)]


def _bitsandbytes(name: str) -> Any:
    return lambda params: getattr(import_module("bitsandbytes").optim, name)(params)


def _torchao(name: str, **settings: int) -> Any:
    return lambda params: getattr(import_module("torchao.optim"), name)(params, **settings)


def _ported(name: str, **settings: Any) -> Any:
    return lambda params: getattr(import_module("pytorch_optimizer"), name)(params, **settings)


def _low_rank(package: str, name: str, **settings: Any) -> Any:
    def build(params: Any) -> Any:
        module = import_module(package)
        matrices = {"params": [p for p in params if p.dim() == 2], "proj_type": "std", "scale": 1.0} | settings
        groups = [{"params": [p for p in params if p.dim() != 2]}, matrices]
        return getattr(module, name)(groups, no_deprecation_warning=True)

    return build


def _galore(rank: int) -> Any:
    return _low_rank("galore_torch", "GaLoreAdamW", rank=rank, update_proj_gap=2)


def _apollo(rank: int, scale_type: str) -> Any:
    return _low_rank("apollo_torch", "APOLLOAdamW", rank=rank, update_proj_gap=2, proj="random", scale_type=scale_type)


def _came(params: Any) -> Any:
    return import_module("came_pytorch.CAME").CAME(params, lr=1e-3, weight_decay=0.1)


def _parameters(shapes: list[tuple[int, ...]]) -> list[Parameter]:
    return [Parameter(f"p{number}", shape, "mlp", "linear") for number, shape in enumerate(shapes)]


def _tensors(shapes: list[tuple[int, ...]], dtype: str) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    kind = getattr(torch, dtype)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(kind)) for shape in shapes]


def _take_step(optimizer: Any, tensors: list[Any]) -> None:
    generator = torch.Generator().manual_seed(2)
    for tensor in tensors:
        tensor.grad = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    optimizer.step()


def _said(model: Any, parameter: Parameter, context: OptimizerContext) -> dict[str, int]:
    return {state.name: state.num_bytes for state in model.state(parameter, context)}


AO = {"implementation": "torchao"}
QUANTIZED_CASES = [
    ("adamw-8bit", {}, _bitsandbytes("AdamW8bit")),
    # On the CPU a paged optimizer falls back to plain memory: the bytes are those of its managed memory.
    ("paged-adamw-8bit", {}, _bitsandbytes("PagedAdamW8bit")),
    ("adamw-8bit", AO, _torchao("AdamW8bit")),
    ("adamw-8bit", AO | {"block_size": "64"}, _torchao("AdamW8bit", block_size=64)),
    ("adamw-4bit", {}, _torchao("AdamW4bit")),
    ("adamw-fp8", {}, _torchao("AdamWFp8")),
]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "options", "real"), QUANTIZED_CASES)
def test_quantized_state_equals_the_package(
    name: str, options: dict[str, str], real: Any, dtype: Any, state_bytes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torchao compiles its update; uncompiled it writes the same state, without minutes of compilation.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    shapes = [shape for shape in QUANTIZED if shape != (0, 5) or "bitsandbytes" not in str(real)]
    parameters, tensors = _parameters(shapes), _tensors(shapes, dtype)
    model, context = build_optimizer(name, options), OptimizerContext(dtype, dtype)
    optimizer = real(tensors)
    _take_step(optimizer, tensors)
    shared = {state.name: state.num_bytes for state in model.shared_state(parameters, context)}
    seen: dict[str, int] = {}
    for parameter, tensor in zip(parameters, tensors, strict=True):
        found = state_bytes(optimizer, tensor)
        seen |= {part: found.pop(part) for part in shared if part in found}
        assert _said(model, parameter, context) == found, parameter.shape
    assert seen == shared


def test_bitsandbytes_lookup_tables_are_shared_by_all_tensors() -> None:
    tensors = _tensors([(64, 64), (4160,)], "float32")
    optimizer = _bitsandbytes("AdamW8bit")(tensors)
    _take_step(optimizer, tensors)
    first, second = (optimizer.state[tensor] for tensor in tensors)
    assert [first[name].data_ptr() == second[name].data_ptr() for name in ("qmap1", "qmap2")] == [True, True]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flash_adamw_state_equals_the_port_which_keeps_no_step(dtype: Any, state_bytes: Any) -> None:
    shapes = [*SHAPES, *DEEP, (0, 5)]
    tensors, context = _tensors(shapes, dtype), OptimizerContext(dtype, dtype)
    masters = {"float32": [(None, "none"), (None, "auto")], "bfloat16": [(24, "auto"), (32, "32bit"), (None, "none")]}
    for bits, master in masters[dtype]:
        model = build_optimizer("flash-adamw", {"master": master})
        optimizer = _ported("FlashAdamW", master_weight_bits=bits)(tensors)
        _take_step(optimizer, tensors)
        for parameter, tensor in zip(_parameters(shapes), tensors, strict=True):
            said = _said(model, parameter, context)
            assert said.pop("step") == 8
            assert said == state_bytes(optimizer, tensor), (master, parameter.shape)


ALL_MATRICES = {"target": "all-matrices"}
MINI = ALL_MATRICES | {"rank": "1", "scale_type": "tensor"}
PORT = {"implementation": "pytorch_optimizer"}
STEP_CASES = [
    ("came", {}, _came, [*SHAPES, *DEEP], 3),
    # On CUDA fp32 tensors are one batch by default, 16-bit tensors never are.
    ("sm3", {}, _ported("SM3", foreach=True), [*SHAPES, *DEEP], 3),
    ("sm3", {"momentum": "0.9"}, _ported("SM3", foreach=True, momentum=0.9), [*SHAPES, *DEEP], 3),
    # The third step renews projectors whose gap is 2; the eleventh renews SOAP's bases.
    ("galore", ALL_MATRICES | {"rank": "8"}, _galore(8), [*VECTORS, *MATRICES, (1, 9), ()], 3),
    ("galore", ALL_MATRICES | {"rank": "50"}, _galore(50), [*VECTORS, *MATRICES], 3),
    ("apollo", ALL_MATRICES | {"rank": "8"}, _apollo(8, "channel"), [*VECTORS, *MATRICES, (1, 9), ()], 3),
    ("apollo", ALL_MATRICES | {"rank": "50"}, _apollo(50, "channel"), [*VECTORS, *MATRICES], 3),
    ("apollo", MINI, _apollo(1, "tensor"), [*VECTORS, *MATRICES], 3),
    ("soap", PORT, _ported("SOAP"), [*VECTORS, *MATRICES], 11),
    ("soap", PORT | {"max_precond_dim": "64"}, _ported("SOAP", max_precondition_dim=64), [*VECTORS, *MATRICES], 11),
    ("soap", PORT | {"precondition_1d": "true"}, _ported("SOAP", precondition_1d=True), [(3,), (65,), (9, 5)], 11),
]
IDS = ["-".join([case[0], *(f"{key}={value}" for key, value in case[1].items())]) for case in STEP_CASES]


def _by_runs(events: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Sort allocations that nothing is freed between: the CPU's SVD makes its outputs in another order."""
    runs: list[list[tuple[str, int]]] = []
    for event in events:
        if runs and runs[-1][0][0] == event[0]:
            runs[-1].append(event)
        else:
            runs.append([event])
    return [event for run in runs for event in sorted(run)]


def _without_scalars(events: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Drop tensors of one element: whether APOLLO's limit on growth is one or a Python number depends on the data."""
    return [event for event in events if event[1] > 4]


@pytest.fixture
def _seeds_without_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """APOLLO draws its next seed as a host tensor, on the GPU too; here it counts."""
    projector = import_module("apollo_torch.random_projector")
    monkeypatch.setattr(projector, "next_seed", lambda seed: seed + 1)


@pytest.mark.usefixtures("_seeds_without_tensors")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "options", "real", "shapes", "step"), STEP_CASES, ids=IDS)
def test_state_and_step_equal_the_package(
    name: str,
    options: dict[str, str],
    real: Any,
    shapes: Any,
    step: int,
    dtype: Any,
    state_bytes: Any,
    real_events: Any,
    model_events: Any,
) -> None:
    parameters, tensors = _parameters(shapes), _tensors(shapes, dtype)
    model, context = build_optimizer(name, options), OptimizerContext(dtype, dtype)
    assert model.unsupported_reason(parameters, context) is None
    optimizer = real(tensors)
    said, found = model_events(model, parameters, context), real_events(optimizer, tensors, step=step)
    if name == "apollo":
        said, found = _without_scalars(said), _without_scalars(found)
    assert _by_runs(said) == _by_runs(found)
    for parameter, tensor in zip(parameters, tensors, strict=True):
        assert _said(model, parameter, context) == state_bytes(optimizer, tensor), parameter.shape
