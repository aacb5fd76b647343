"""The matrix that every optimizer passes: backend x dtype x shape x steps x checkpoint in the middle.

Where there is no GPU, kernels run in Triton's interpreter, which must be chosen before triton is imported.
"""

from __future__ import annotations

import gc
import io
import os
import runpy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from optplan.planner.dtypes import Dtype
from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel
from optplan.planner.tensors import Parameter

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

Build = Callable[[list[torch.nn.Parameter], str], torch.optim.Optimizer]
"""Makes the optimizer for parameters, on a backend (`triton` or `torch`)."""


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> Iterator[None]:
    """Interpreted launches prepare the language once."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("TRITON_INTERPRET") == "1":
            runpy.run_path(str(Path(__file__).with_name("quick_interpreter.py")))["prepare_once"](patch)
        yield


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES: tuple[tuple[int, ...], ...] = ((1,), (63,), (255,), (4097,), (37, 101), (3, 5, 7), (1, 65), (65, 1), (), (0,))
NUM_STEPS = 3


def matrix_parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """A parameter of each shape, and two that are not contiguous."""
    generator = torch.Generator().manual_seed(7)
    tensors = [torch.randn(shape, generator=generator) for shape in SHAPES]
    tensors += [torch.randn(17, 31, generator=generator).t(), torch.randn(40, generator=generator)[::2]]
    return [torch.nn.Parameter(_same_strides(tensor, dtype)) for tensor in tensors]


def _same_strides(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    storage = torch.empty(tensor.untyped_storage().nbytes() // 4, dtype=dtype, device=DEVICE)
    return storage.as_strided(tensor.size(), tensor.stride()).copy_(tensor)


def set_gradients(parameters: Sequence[torch.nn.Parameter], step: int) -> None:
    """New gradients that depend on the step alone."""
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters:
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient.to(device=parameter.device, dtype=parameter.dtype)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within it, torch fills fresh memory with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run_steps(
    build: Build, dtype: torch.dtype, backend: str, *, reload_after: int | None = None, num_steps: int = NUM_STEPS
) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """Steps on the matrix's parameters; after one of them, perhaps, a fresh optimizer goes on from a saved state."""
    parameters = matrix_parameters(dtype)
    optimizer = build(parameters, backend)
    for step in range(num_steps):
        set_gradients(parameters, step)
        copies = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
        optimizer.step()
        for parameter, copy in zip(parameters, copies, strict=True):
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, copy), "the step wrote to a gradient"
        if step == reload_after:
            saved = io.BytesIO()
            torch.save(optimizer.state_dict(), saved)
            saved.seek(0)
            optimizer = build(parameters, backend)
            optimizer.load_state_dict(torch.load(saved, weights_only=True))
    return parameters, optimizer


def assert_same_bits(ours: Any, theirs: Any) -> None:
    """Tensors, or states of parameters, are equal bit by bit, dtypes included."""
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for name in ours:
            assert_same_bits(ours[name], theirs[name])
    else:
        assert ours == theirs


def check_matrix(build: Build, *, dtype: torch.dtype, backend: str) -> None:
    """Finite results that neither stale memory nor a checkpoint in the middle changes, and no gradient kept alive."""
    parameters, optimizer = run_steps(build, dtype, backend)
    with poisoned_memory():
        poisoned, after_poison = run_steps(build, dtype, backend)
    resumed, after_resume = run_steps(build, dtype, backend, reload_after=1)
    starts = matrix_parameters(dtype)
    for place, parameter in enumerate(parameters):
        assert parameter.isfinite().all()
        assert parameter.numel() == 0 or not torch.equal(parameter, starts[place]), "a parameter did not move"
        for others, other in ((poisoned, after_poison), (resumed, after_resume)):
            assert_same_bits(parameter.detach(), others[place].detach())
            assert_same_bits(dict(optimizer.state[parameter]), dict(other.state[others[place]]))
    _check_gradients_are_freed(parameters, optimizer)


def _check_gradients_are_freed(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    references = [weakref.ref(parameter.grad) for parameter in parameters]
    optimizer.zero_grad(set_to_none=True)
    gc.collect()
    assert not any(reference() is not None for reference in references), "the optimizer keeps a gradient alive"


def check_planner(
    optimizer: torch.optim.Optimizer, model: OptimizerModel, described: Sequence[Parameter], *, state_dtype: Any = None
) -> None:
    """Every state tensor has the name, shape, dtype and bytes that the planner says."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter, description in zip(parameters, described, strict=True):
        dtype: Dtype = str(parameter.dtype).removeprefix("torch.")  # type: ignore[assignment]
        context = OptimizerContext(dtype, dtype, state_dtype)
        expected = [(s.name, s.shape, s.dtype, s.num_bytes) for s in model.state(description, context)]
        found = [
            (name, tuple(value.shape), str(value.dtype).removeprefix("torch."), value.numel() * value.itemsize)
            for name, value in optimizer.state[parameter].items()
            if isinstance(value, torch.Tensor)
        ]
        assert found == expected, description.name


@pytest.fixture(name="check_matrix")
def _check_matrix() -> Callable[..., None]:
    """`check_matrix(build, dtype=..., backend=...)` as above."""
    return check_matrix


@pytest.fixture(name="check_planner")
def _check_planner() -> Callable[..., None]:
    """`check_planner(optimizer, model, described, state_dtype=...)` as above."""
    return check_planner


@pytest.fixture(name="run_steps")
def _run_steps() -> Callable[..., Any]:
    """`run_steps(build, dtype, backend, reload_after=..., num_steps=...)` as above."""
    return run_steps


@pytest.fixture(name="set_gradients")
def _set_gradients() -> Callable[..., None]:
    """`set_gradients(parameters, step)` as above."""
    return set_gradients
