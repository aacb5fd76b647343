"""What a CUDA GPU shows of Adapprox beside what it shows of every optimizer: how well factors hold second moments."""

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
Contract, SUBJECTS = _contract["Contract"], _contract["SUBJECTS"]
_kept = runpy.run_path(str(Path(__file__).with_name("kept_moments.py")))
error, kept_after, product = _kept["error"], _kept["kept_after"], _kept["product"]
NAMES = [name for name, subject in SUBJECTS.items() if subject.optimizer == "adapprox"]


def _next_moment(state: dict[str, torch.Tensor], gradient: torch.Tensor) -> torch.Tensor | None:
    """What the second moment is to become, in float64; None where it is kept whole."""
    if "q_factor" not in state:
        return None
    low = product(state)
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
            assert error(moment, ours.optimizer.state[a]) < 1.01 * error(moment, reference.state[b]) + 1e-3


def test_a_hundred_steps_hold_the_second_moment_as_the_paper_s_mode_does() -> None:
    """One iteration from the last step's factors (two in the first steps), beside five from noise at every step.

    Gradients of independent entries are the hardest: nothing that a step leaves out of the factors comes back.
    """
    subject = SUBJECTS["adapprox"]
    for kept in kept_after(Contract(subject).train(torch.bfloat16, 0), subject, 100):
        assert kept.ours <= 1.05 * kept.paper + 0.01, kept
