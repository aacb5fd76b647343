"""What a CUDA GPU shows of Adapprox beside what it shows of every optimizer: how well factors hold second moments."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from optplan.optim_impls.adapprox.reference import s_rsi, seeded_sketch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
_contract = runpy.run_path(str(Path(__file__).parents[1] / "optimizer_contract.py"))
Contract, SUBJECTS = _contract["Contract"], _contract["SUBJECTS"]
NAMES = [name for name, subject in SUBJECTS.items() if subject.optimizer == "adapprox"]


def _product(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return state["q_factor"].double() @ state["u_factor"].double().mT


def _error(moment: torch.Tensor, state: dict[str, torch.Tensor]) -> float:
    return float((moment - _product(state)).norm() / moment.norm())


def _next_moment(state: dict[str, torch.Tensor], gradient: torch.Tensor) -> torch.Tensor | None:
    """What the second moment is to become, in float64; None where it is kept whole."""
    if "q_factor" not in state:
        return None
    low = _product(state)
    return 0.999 * low.clamp(min=0) + 0.001 * gradient.double().reshape(low.shape).square()


def _in_float64(ours: Any, subject: Any) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """The reference at the same point, with the same gradients."""
    theirs = [torch.nn.Parameter(p.detach().double()) for p in ours.parameters]
    reference = subject.build(theirs, backend="torch")
    saved = ours.optimizer.state_dict()
    saved["state"] = {
        place: {n: t.double() if t.dim() and t.device.type == "cuda" else t for n, t in state.items()}
        for place, state in saved["state"].items()
    }
    reference.load_state_dict(saved)
    for a, b in zip(ours.parameters, theirs, strict=True):
        b.grad = a.grad.double()
    return theirs, reference


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_step_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    """From one state: the update to the dtype's rounding, the second moment held as well as the reference holds it."""
    ours = Contract(SUBJECTS[name]).train(dtype, 5)
    ours.renew_gradients()
    theirs, reference = _in_float64(ours, SUBJECTS[name])
    starts = [p.detach().clone() for p in theirs]
    moments = [_next_moment(ours.optimizer.state[p], p.grad) for p in ours.parameters]
    ours.optimizer.step()
    reference.step()
    for a, b, start, moment in zip(ours.parameters, theirs, starts, moments, strict=True):
        difference, change = (a.detach().double() - b.detach()).norm(), (b.detach() - start).norm()
        rounding = (b.detach().to(dtype).double() - b.detach()).norm()
        assert difference <= 2e-3 * change + 1.5 * rounding
        if moment is not None:
            assert _error(moment, ours.optimizer.state[a]) < 1.01 * _error(moment, reference.state[b]) + 1e-3


def test_a_hundred_steps_hold_the_second_moment_as_the_paper_s_mode_does() -> None:
    """Against the whole second moment in float64: five iterations from noise on it, and the kernels."""
    training = Contract(SUBJECTS["adapprox"]).train(torch.bfloat16, 0)
    whole = [torch.zeros(p.shape, dtype=torch.float64, device="cuda") for p in training.parameters]
    for _ in range(100):
        training.run(1)
        for p, v in zip(training.parameters, whole, strict=True):
            v.mul_(0.999).addcmul_(p.grad.double(), p.grad.double(), value=0.001)
    for p, v in zip(training.parameters, whole, strict=True):
        if "q_factor" in (state := training.optimizer.state[p]):
            v, rank = v.view(len(state["q_factor"]), -1), state["q_factor"].shape[1]
            q, u = s_rsi(v, rank, seeded_sketch(0, step=1, index=0, like=v))
            assert _error(v, state) <= 1.05 * float((v - q @ u.mT).norm() / v.norm()) + 0.01
