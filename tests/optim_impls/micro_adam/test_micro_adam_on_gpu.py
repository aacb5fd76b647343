"""What a CUDA GPU shows of MicroAdam beside what it shows of every optimizer: other layouts, selection, bad blocks."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
_contract = runpy.run_path(str(Path(__file__).parents[1] / "optimizer_contract.py"))
Contract, Training, SUBJECT = _contract["Contract"], _contract["Training"], _contract["SUBJECTS"]["micro-adam"]


@pytest.mark.parametrize(
    "options",
    [
        {"bias_correction": "window", "window": 3},
        {"block": 1024, "bucket": 32, "density": 0.02},
        {"block": 4096, "bucket": 128},
        {"block": 256, "bucket": 8},
    ],
)
def test_kernels_equal_the_reference_in_other_layouts(options: dict[str, Any]) -> None:
    Contract(SUBJECT).equals_the_reference(torch.bfloat16, **options)


def _shifted(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that begins an element after an aligned place."""
    room = tensor.new_empty(tensor.numel() + 1)
    return room[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_equal_the_reference_where_nothing_is_aligned(dtype: torch.dtype) -> None:
    starts, trainings = Training(SUBJECT, dtype, device="cuda").parameters, []
    for backend in ("triton", "torch"):
        shifted = [_shifted(start.detach()) for start in starts]
        training = Training(SUBJECT, dtype, device="cuda", starts=shifted, alpha=0.25, backend=backend)
        for p in training.parameters:
            p.grad = _shifted(torch.zeros_like(p))
        trainings.append(training.run(5))
    Contract(SUBJECT).agree(*trainings, dtype)


def test_100_steps_select_as_the_reference() -> None:
    contract = Contract(SUBJECT)
    contract.agree_on_exact_state(*(contract.train(torch.bfloat16, 100, backend=b) for b in ("triton", "torch")))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e38])
@pytest.mark.parametrize("alpha", [0.0, 0.25])
def test_a_block_that_is_not_finite_sits_out(bad: float, alpha: float) -> None:
    training = Contract(SUBJECT).train(torch.bfloat16, 4, alpha=alpha)
    parameter, state = training.parameters[7], training.optimizer.state[training.parameters[7]]
    training.renew_gradients()
    parameter.grad[5000] = bad
    block, old = slice(2 * 2048, 3 * 2048), parameter.detach().clone()
    # Half a byte for each element, a range for each 64.
    pieces = {"error_feedback": slice(2048, 3072), "bucket_min": slice(64, 96), "bucket_max": slice(64, 96)}
    before = {name: state[name].clone() for name in pieces}
    training.optimizer.step()
    assert torch.equal(parameter[block], old[block])
    assert not torch.equal(parameter, old)
    for name, piece in pieces.items():
        assert torch.equal(state[name][piece], before[name][piece]), name
        assert not torch.equal(state[name], before[name]), name
    assert all(p.isfinite().all() for p in training.parameters)
