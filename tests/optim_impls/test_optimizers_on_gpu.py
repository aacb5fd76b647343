"""What only a CUDA GPU shows, of every optimizer: repetition, graphs, allocations, missing synchronisation."""

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
_contract = runpy.run_path(str(Path(__file__).with_name("optimizer_contract.py")))
Contract, SUBJECTS = _contract["Contract"], _contract["SUBJECTS"]
# One of each class, where options change nothing of what is asked.
ONE_EACH = ("adamw", "adam-mini", "micro-adam", "adapprox")
COMPARED = [name for name, subject in SUBJECTS.items() if subject.agreement]


@pytest.fixture(name="contract")
def _contract_of(request: pytest.FixtureRequest) -> Any:
    return Contract(SUBJECTS[request.param])


def of(*names: str) -> pytest.MarkDecorator:
    """A test's subjects."""
    return pytest.mark.parametrize("contract", names, indirect=True)


@of(*SUBJECTS)
def test_two_runs_are_equal_bit_by_bit(contract: Any) -> None:
    contract.repeats()


@of(*ONE_EACH)
def test_two_runs_with_counters_on_the_device_are_equal_bit_by_bit(contract: Any) -> None:
    contract.repeats(capturable=True)


@of(*ONE_EACH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_in_the_middle_changes_nothing(contract: Any, dtype: torch.dtype) -> None:
    contract.resumes(dtype)


@of(*SUBJECTS)
@pytest.mark.parametrize("scheduled", [False, True])
def test_replays_of_a_graph_are_steps(contract: Any, *, scheduled: bool) -> None:
    contract.replays(scheduled=scheduled)


@of(*SUBJECTS)
def test_a_step_allocates_what_the_planner_says_and_never_waits(contract: Any) -> None:
    contract.allocates(capturable=False)


@of("adamw", "micro-adam", "micro-adam-dense")
def test_so_does_a_step_with_counters_on_the_device(contract: Any) -> None:
    contract.allocates(capturable=True)


@of("adamw", "adamw-stochastic", "adam-mini", "adam-mini-stochastic", "micro-adam")
def test_counters_on_the_device_give_the_same_steps(contract: Any) -> None:
    contract.counts_on_the_device()


@of(*ONE_EACH)
def test_a_scale_on_the_device_is_a_scale_on_the_host(contract: Any) -> None:
    contract.scales_on_the_device()


@of(*ONE_EACH)
def test_gradients_that_move_are_followed(contract: Any) -> None:
    contract.follows_gradients_that_move()


@of("adamw", "adam-mini")
@pytest.mark.parametrize("num_steps", [1, 100])
def test_fp32_steps_are_those_of_float64(contract: Any, num_steps: int) -> None:
    contract.stays_near_float64(num_steps)


@of(*COMPARED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_equal_the_reference(contract: Any, dtype: torch.dtype) -> None:
    contract.equals_the_reference(dtype)


@of(*ONE_EACH)
def test_new_numbers_do_not_compile_again(contract: Any) -> None:
    contract.compiles_once()
