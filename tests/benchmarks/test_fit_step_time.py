"""What records tell of their hosts, in the fit of the step-time model."""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from optplan.planner.step_time_rates import TimeModel, load_time_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cases(fitting: ModuleType) -> list[Any]:
    """The measured steps of one host."""
    found: list[Any] = fitting.read_cases(load_time_model().records[:1])
    return found


def _without_reference() -> TimeModel:
    """The committed coefficients as they are where no record tells how fast its host launched."""
    model = load_time_model()
    return msgspec.structs.replace(model, host=msgspec.structs.replace(model.host, launch_reference_seconds=None))


def _on_hosts(fitting: ModuleType, cases: list[Any], model: TimeModel) -> list[Any]:
    """Small steps, mostly decided by the host, as they would be on hosts of other speeds that their records tell."""
    speeds, small = [0.5, 0.8, 1.0, 1.3, 2.1], [case for case in cases if fitting.model_of(case) == "gpt2"]
    return [_timed(fitting, case, 8e-6 * speeds[index % 5], model) for index, case in enumerate(small)]


def _timed(fitting: ModuleType, case: Any, launch_seconds: float, model: TimeModel) -> Any:
    """A step that takes as long as the model says, its phases too, on a host that launches so fast."""
    told = case._replace(time=msgspec.structs.replace(case.time, host_launch_seconds=launch_seconds))
    ends = fitting.predicted_ends(told, model)
    step = fitting.update_of(told, model).busy
    step_seconds = max(step.gpu, step.host * launch_seconds / model.host.launch_reference_seconds)
    phases = {"forward": ends[0], "backward": ends[1] - ends[0], "step": step_seconds}
    return told._replace(time=msgspec.structs.replace(told.time, step_seconds=ends[-1], phases=phases))


def test_what_records_tell_of_their_hosts_is_their_factor(fitting: ModuleType, cases: list[Any]) -> None:
    untold_model = _without_reference()
    host = msgspec.structs.replace(untold_model.host, launch_reference_seconds=8e-6, seconds_per_launch=1.5e-5)
    told = _on_hosts(fitting, cases, msgspec.structs.replace(untold_model, host=host))
    start = fitting.with_reference(untold_model, told)
    assert start.host.launch_reference_seconds == 8e-6
    # From steps of gpt2 alone not every coefficient can be told, but their times can.
    assert max(map(abs, fitting.errors_of(told, fitting.fit(told, start)))) < 0.05
    untold = [case._replace(time=msgspec.structs.replace(case.time, host_launch_seconds=None)) for case in told]
    assert fitting.with_reference(start, untold) == untold_model
    assert max(map(abs, fitting.errors_of(untold, fitting.fit(untold, untold_model)))) > 0.3


def test_the_fit_is_written_with_what_records_tell_of_their_hosts(fitting: ModuleType) -> None:
    model = _without_reference()
    text = re.sub(r"(?m)^launch_reference_seconds = .*\n", "", fitting.TABLE.read_text("utf-8"))
    found = msgspec.structs.replace(
        model.host, seconds_per_call=2e-5, seconds_per_launch=9e-6, launch_reference_seconds=7.654e-6
    )
    written = fitting.written(text, msgspec.structs.replace(model, host=found), {})
    assert tomllib.loads(written)["host"] == tomllib.loads(text)["host"] | {
        "seconds_per_call": 2e-5, "seconds_per_launch": 9e-6, "launch_reference_seconds": 7.65e-6,
    }  # fmt: skip
    told = msgspec.convert(tomllib.loads(written), type(model))
    assert fitting.written(written, told, {}) == written


def test_forward_and_backward_weigh_less_than_the_step(fitting: ModuleType, cases: list[Any]) -> None:
    case = next(case for case in cases if fitting.model_of(case) == "gpt2")
    phases = {"forward": 0.4, "backward": 0.5, "step": 0.1}
    case = case._replace(time=msgspec.structs.replace(case.time, step_seconds=1.0, phases=phases))
    # Forward takes half of what was measured, backward twice; then the step ends as measured, or 10 % later.
    twice = math.log(2) ** 2
    assert fitting.squared_error(case, [0.2, 1.2, 1.0]) == pytest.approx(0.25 * 2 * twice)
    assert fitting.squared_error(case, [0.4, 0.9, 1.1]) == pytest.approx(math.log(1.1) ** 2)
    # Where the host runs ahead the ends are not told apart.
    assert fitting.squared_error(case, [1.1]) == pytest.approx(math.log(1.1) ** 2)


def test_steps_with_phases_say_how_they_end(fitting: ModuleType, cases: list[Any]) -> None:
    model = load_time_model()
    by_model = {fitting.model_of(case): case for case in cases}
    ends = fitting.predicted_ends(by_model["gpt2"], model)
    assert len(ends) == 3
    assert ends == sorted(ends)
    # BERT asks for no value off the GPU: its steps follow one another without a break.
    assert len(fitting.predicted_ends(by_model["bert-large"], model)) == 1


def test_an_optimizers_launches_are_known_from_its_own_step(fitting: ModuleType, cases: list[Any]) -> None:
    model = load_time_model()
    small = [case for case in cases if fitting.model_of(case) == "gpt2" and case.candidate.implementation == "torch"]
    assert [case.candidate.id for case in small] == ["adafactor"]
    before = model.rates_of("adafactor", "torch")
    phases = {name: 3 * seconds for name, seconds in small[0].time.phases.items()}
    slower = small[0]._replace(time=msgspec.structs.replace(small[0].time, phases=phases))
    once, thrice = (
        fitting.with_update_rates(model, [case]).rates_of("adafactor", "torch") for case in (*small, slower)
    )
    assert thrice.seconds_per_tensor == pytest.approx(3 * once.seconds_per_tensor, rel=0.01)
    assert thrice.seconds_per_matrix == pytest.approx(3 * once.seconds_per_matrix, rel=0.01)
    assert once.seconds_per_element == before.seconds_per_element
    # Where the GPU decides how long the optimizer's step takes nothing is known of the host.
    large = [case for case in cases if case.name.startswith("llama-2-7b_adamw_batch_size=1_seq_len=2048_check")]
    assert fitting.with_update_rates(model, large) == model
    text = fitting.TABLE.read_text("utf-8")
    table = tomllib.loads(fitting.update_rates.written(text, fitting.with_update_rates(model, [slower])))
    row = next(row for row in table["optimizer"] if (row["id"], row["implementation"]) == ("adafactor", "torch"))
    assert row["seconds_per_tensor"] == thrice.seconds_per_tensor
    assert fitting.update_rates.written(text, model) == text
