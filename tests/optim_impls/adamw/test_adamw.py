from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from optplan.optim_impls import AdamW
from optplan.optim_impls.launch import TableImage
from optplan.planner.optimizers.base import OptimizerContext
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.tensors import Parameter
from optplan.planner.timeline import Allocation, TimelineBuilder

ROUNDINGS = ("nearest", "stochastic", "kahan")
BACKENDS = ("triton", "torch")
MATRIX = [
    ("nearest", torch.float32),
    ("nearest", torch.bfloat16),
    ("nearest", torch.float16),
    ("stochastic", torch.bfloat16),
    ("kahan", torch.bfloat16),
    ("kahan", torch.float32),
]
HYPER = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(1,), (63,), (255,), (2050,), (37, 31), (), (0,)]


def _parameters(dtype: torch.dtype, shapes: Any = SHAPES) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rounding", "dtype"), MATRIX)
def test_matrix(check_matrix: Callable[..., None], rounding: str, dtype: torch.dtype, backend: str) -> None:
    check_matrix(lambda p, b: AdamW(p, **HYPER, rounding=rounding, backend=b), dtype=dtype, backend=backend)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capturable", [False, True])
def test_matrix_of_state_dtypes(check_matrix: Callable[..., None], state_dtype: torch.dtype, capturable: bool) -> None:
    options = {"state_dtype": state_dtype, "capturable": capturable}
    check_matrix(lambda p, b: AdamW(p, **HYPER, **options, backend=b), dtype=torch.bfloat16, backend="triton")


def _double_adamw(start: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """AdamW by torch in float64."""
    parameter = torch.nn.Parameter(start.double())
    optimizer = torch.optim.AdamW([parameter], **HYPER)
    for gradient in gradients:
        parameter.grad = gradient.double()
        optimizer.step()
    return parameter.detach()


def _run(cls: Any, start: torch.Tensor, gradients: list[torch.Tensor], **options: Any) -> torch.Tensor:
    parameter = torch.nn.Parameter(start.clone())
    optimizer = cls([parameter], **HYPER, **options)
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    return parameter.detach().double()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_steps", [1, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_that_of_torch(dtype: torch.dtype, num_steps: int, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(700, generator=generator).to(dtype)
    gradients = [torch.randn(700, generator=generator).to(dtype) for _ in range(num_steps)]
    exact = _double_adamw(start, gradients)
    ours = (_run(AdamW, start, gradients, backend=backend) - exact).norm()
    torchs = (_run(torch.optim.AdamW, start, gradients) - exact).norm()
    assert 0 < ours <= 1.1 * torchs


@pytest.mark.parametrize(
    ("rounding", "backend", "tolerance"),
    [
        ("nearest", "torch", None),
        # The mean of 2048 roundings by 2^-8 strays by at most 2^-9 / sqrt(2048) = 4e-5; five of these.
        ("stochastic", "torch", 2e-4),
        ("stochastic", "triton", 2e-4),
        # All elements are alike, and what is left over is less than half a unit.
        ("kahan", "torch", 2**-9),
        ("kahan", "triton", 2**-9),
    ],
)
def test_steps_below_half_a_unit(rounding: str, backend: str, tolerance: float | None) -> None:
    parameter = torch.nn.Parameter(torch.ones(2048, dtype=torch.bfloat16))
    # A constant gradient moves every parameter by lr a step; half a bf16 unit below 1 is 2e-3.
    hyper = {"lr": 2e-4, "weight_decay": 0.0, "state_dtype": torch.float32}
    optimizer = AdamW([parameter], **hyper, rounding=rounding, backend=backend)
    for _ in range(30):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    mean = parameter.detach().double().mean().item()
    assert mean == (1.0 if tolerance is None else pytest.approx(1 - 60e-4, abs=tolerance))


def test_kahan_is_as_good_as_fp32_once_the_rest_is_added() -> None:
    start = torch.randn(512, generator=torch.Generator().manual_seed(1)).bfloat16()
    gradients = [torch.full((512,), 0.5, dtype=torch.bfloat16)] * 50
    parameter = torch.nn.Parameter(start.clone())
    optimizer = AdamW([parameter], lr=1e-4, weight_decay=0.0, rounding="kahan", state_dtype=torch.float32)
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    carried = parameter.detach().double() + optimizer.state[parameter]["compensation"].double()
    # A constant gradient moves every parameter by lr a step. Below 4 half a bf16 unit is 2^-7, of which the carried
    # rest keeps 8 bits: each step may lose 2^-16.
    assert start.abs().max() < 4
    torch.testing.assert_close(carried, start.double() - 50e-4, rtol=0, atol=50 * 2**-16)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_and_reference_agree(run_steps: Callable[..., Any], dtype: torch.dtype, rounding: str) -> None:
    def build(parameters: Any, backend: str) -> AdamW:
        return AdamW(parameters, **HYPER, rounding=rounding, seed=5, backend=backend)

    ours, reference = (run_steps(build, dtype, backend)[0] for backend in BACKENDS)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6 if dtype == torch.float32 else 8e-3, atol=2e-7)


@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25), torch.tensor([0.25], dtype=torch.float64)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_multiplies_the_gradient(scale: Any, backend: str) -> None:
    scaled, plain = _parameters(torch.float32), _parameters(torch.float32)
    for parameters, factor in ((scaled, 1.0), (plain, 0.25)):
        optimizer = AdamW(parameters, **HYPER, backend=backend)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter) * factor
        optimizer.step(grad_scale=scale if parameters is scaled else None)
    for a, b in zip(scaled, plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_schedule_in_fp32_follows_torch(backend: str) -> None:
    results = []
    for cls, options in ((AdamW, {"backend": backend}), (torch.optim.AdamW, {})):
        parameters = _parameters(torch.float32)
        optimizer = cls(
            [{"params": parameters[:2]}, {"params": parameters[2:], "weight_decay": 0.0}], **HYPER, **options
        )
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
        for step in range(6):
            for place, parameter in enumerate(parameters):
                generator = torch.Generator().manual_seed(place + 100 * step)
                parameter.grad = torch.randn(parameter.shape, generator=generator) if (place + step) % 3 else None
            optimizer.step()
            scheduler.step()
        results.append(parameters)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-7)


STATES = [
    ({}, {}, None),
    ({"state_dtype": torch.float32}, {}, "float32"),
    ({"state_dtype": torch.bfloat16}, {}, "bfloat16"),
    ({"rounding": "kahan"}, {"rounding": "kahan"}, None),
    ({"rounding": "stochastic"}, {"rounding": "stochastic"}, None),
]


@pytest.mark.parametrize(("options", "planned", "state_dtype"), STATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_what_the_planner_says(
    check_planner: Callable[..., None], options: Any, planned: Any, state_dtype: Any, dtype: torch.dtype
) -> None:
    parameters = _parameters(dtype)
    optimizer = AdamW(parameters, **options)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    model = build_optimizer("adamw", {"implementation": "optplan", **planned})
    described = [Parameter(str(shape), shape, "other", "linear") for shape in SHAPES]
    check_planner(optimizer, model, described, state_dtype=state_dtype)


def test_state_of_torch_goes_on_in_ours() -> None:
    theirs, ours = _parameters(torch.float32, [(50,)]), _parameters(torch.float32, [(50,)])
    source, target = torch.optim.AdamW(theirs, **HYPER), AdamW(ours, rounding="kahan", **HYPER)
    theirs[0].grad = torch.ones(50)
    source.step()
    ours[0].data.copy_(theirs[0].data)
    target.load_state_dict(source.state_dict())
    ours[0].grad = theirs[0].grad = torch.full((50,), -2.0)
    source.step()
    target.step()
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-7)
    assert int(target.state[ours[0]]["step"]) == 2


@pytest.mark.parametrize(("rounding", "capturable", "num_lists"), [("nearest", False, 4), ("kahan", True, 6)])
def test_the_planner_s_step_is_the_table_that_is_uploaded(rounding: str, capturable: bool, num_lists: int) -> None:
    parameters = _parameters(torch.bfloat16)
    optimizer = AdamW(parameters, rounding=rounding, capturable=capturable, backend="triton")
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    uploaded = []
    with pytest.MonkeyPatch.context() as patch:
        upload = TableImage.upload
        patch.setattr(TableImage, "upload", lambda image: uploaded.append(upload(image)) or uploaded[-1])
        optimizer.step()
    model = build_optimizer("adamw", {"implementation": "optplan", "rounding": rounding, "capturable": capturable})
    described = [Parameter(str(shape), shape, "other", "linear") for shape in SHAPES if 0 not in shape]
    timeline = TimelineBuilder("step")
    model.write_step(timeline, described, OptimizerContext("bfloat16", "bfloat16"))
    planned = [event.bytes for event in timeline.events if isinstance(event, Allocation)]
    # Six tensors of one chunk each.
    assert [table.buffer.nbytes for table in uploaded] == planned == [6 * (num_lists + 2) * 8 + 6 * 12]
    device = model.state(described[0], OptimizerContext("bfloat16", "bfloat16"))[0].device
    assert device == ("device" if capturable else "cpu")
