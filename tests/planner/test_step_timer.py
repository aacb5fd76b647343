"""The time of a step on a host whose speed was measured: what the host decides follows it, what the GPU decides not."""

from __future__ import annotations

import math

import msgspec
import pytest

from optplan.planner.candidates import choose_optimizers
from optplan.planner.catalog import load_model
from optplan.planner.errors import ConfigError
from optplan.planner.estimate import estimate_request
from optplan.planner.request import StepRequest, check_request
from optplan.planner.step_time_overlap import StepSeconds
from optplan.planner.step_time_rates import TimeModel, load_time_model
from optplan.planner.step_timer import StepTimer, host_factor, host_note
from optplan.planner.workload import Workload

FOR_LOOP = choose_optimizers("adamw", {"implementation": "for-loop"})
FUSED = choose_optimizers("adamw", {"implementation": "fused"})


def reference_seconds() -> float:
    found = load_time_model().host.launch_reference_seconds
    assert found is not None
    return found


def request_of(model: str, *, seq_len: int) -> StepRequest:
    return check_request(load_model(model), gpu="h200", batch_size=1, seq_len=seq_len)


def with_reference(seconds: float | None) -> TimeModel:
    model = load_time_model()
    return msgspec.structs.replace(model, host=msgspec.structs.replace(model.host, launch_reference_seconds=seconds))


@pytest.mark.parametrize(
    ("launch_seconds", "reference", "factor"),
    [(30e-6, 20e-6, 1.5), (15e-6, 20e-6, 0.75), (None, 20e-6, 1.0), (30e-6, None, 1.0)],
)
def test_a_host_is_as_much_slower_as_its_launches_take_longer(
    launch_seconds: float | None, reference: float | None, factor: float
) -> None:
    assert host_factor(launch_seconds, with_reference(reference)) == pytest.approx(factor)


@pytest.mark.parametrize(("seconds", "shown"), [(0.0, "0.0"), (-1e-6, "-1e-06"), (math.inf, "inf"), (math.nan, "nan")])
def test_what_is_no_time_is_refused(seconds: float, shown: str) -> None:
    workload = Workload(request_of("gpt2", seq_len=128))
    with pytest.raises(ConfigError) as refused:
        StepTimer(workload, host_launch_seconds=seconds)
    assert str(refused.value) == f"host_launch_seconds must be above 0 and finite, got {shown}"


def test_a_step_that_the_host_decides_takes_as_much_longer_its_optimizer_included() -> None:
    # A loop over 148 tensors is a good part of it: where its launches stayed as quick, 1.3 times would be seen.
    plain, slower = (_seconds("gpt2", 128, factor) for factor in (None, 1.5))
    assert (plain.bound, slower.bound) == ("host", "host")
    assert slower.step / plain.step == pytest.approx(1.5, rel=1e-3)
    assert slower.optimizer / plain.optimizer == pytest.approx(1.5, rel=1e-3)
    same = _seconds("gpt2", 128, 1.0)
    assert same.as_dict() == pytest.approx(plain.as_dict(), rel=1e-12)


def test_a_step_that_the_gpu_decides_takes_no_less_on_a_quicker_host() -> None:
    plain, quicker = (_seconds("llama-2-7b", 2048, factor, fused=True) for factor in (None, 0.5))
    assert (plain.bound, quicker.bound) == ("gpu", "gpu")
    assert quicker.step == pytest.approx(plain.step, rel=0.01)


def _seconds(model: str, seq_len: int, factor: float | None, *, fused: bool = False) -> StepSeconds:
    workload = Workload(request_of(model, seq_len=seq_len))
    (candidate,), _ = workload.candidates(FUSED if fused else FOR_LOOP)
    launch_seconds = None if factor is None else factor * reference_seconds()
    found = StepTimer(workload, host_launch_seconds=launch_seconds).seconds(candidate)
    assert found is not None
    return found


def test_an_estimate_for_a_measured_host_says_so_and_another_does_not() -> None:
    request = request_of("gpt2", seq_len=128)
    plain = estimate_request(request, FOR_LOOP)
    told = estimate_request(request, FOR_LOOP, host_launch_seconds=1.5 * reference_seconds())
    assert plain.estimates[0].step_seconds is not None and told.estimates[0].step_seconds is not None
    ratio = told.estimates[0].step_seconds["step"] / plain.estimates[0].step_seconds["step"]
    assert ratio == pytest.approx(1.5, rel=1e-3)
    assert told.notes == [*plain.notes, host_note(1.5 * reference_seconds())]
    assert msgspec.structs.replace(told.estimates[0], step_seconds=None) == msgspec.structs.replace(
        plain.estimates[0], step_seconds=None
    )


def test_the_note_has_both_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optplan.planner.step_timer.load_time_model", lambda: with_reference(21e-6))
    assert host_note(16.94e-6) == (
        "times are predicted for a host that takes 16.9 microseconds to launch one operation, as was measured; "
        "a plain estimate assumes 21.0"
    )
    assert host_note(None) is None


def test_what_has_no_time_has_no_note_on_the_host() -> None:
    request = check_request(load_model("gpt2"), memory="40GiB", batch_size=1, seq_len=128)
    report = estimate_request(request, FUSED, host_launch_seconds=2e-5)
    assert report.estimates[0].step_seconds is None
    assert not [note for note in report.notes if "microseconds" in note]
