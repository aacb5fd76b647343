"""The work of a step: who launches it."""

from __future__ import annotations

import pytest

from optplan.planner.catalog import load_model
from optplan.planner.request import check_request
from optplan.planner.requested_step import step_options
from optplan.planner.step.rules import record_step
from optplan.planner.step_time_work import step_work


@pytest.mark.parametrize(
    ("model", "precision", "launched"),
    [("gpt2", "bf16", 361), ("gpt2", "amp", 554), ("qwen3-0.6b", "bf16", 2599), ("mixtral-8x7b", "fp32", 2835)],
)
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_what_is_computed_again_is_launched_from_python(
    model: str, precision: str, launched: int, checkpointing: str
) -> None:
    # Gradients take as many launches, of autograd's own thread, whatever was computed again between them.
    request = check_request(
        load_model(model), gpu="h200", seq_len=512, batch_size=2, precision=precision, checkpointing=checkpointing
    )
    options = step_options(request)
    work = step_work(request.model, options, record_step(request.model, options))
    assert work.backward.num_backward_launches == launched
    assert (work.backward.num_launches > launched) == (checkpointing != "none")
    assert work.forward.num_backward_launches == 0
