"""What other estimators say of measured steps: whole, of the recorded steps, and equal to their documented formulas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optplan.planner.rivals import RivalTool, compared_rivals, load_rivals

RECORDS = Path(__file__).resolve().parents[1] / "records"


def recorded() -> list[dict[str, object]]:
    lines = (RECORDS / "public_h200_cases.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def tool(package: str) -> RivalTool:
    (found,) = [each for each in load_rivals().tools if each.package == package]
    return found


def test_the_cases_are_those_of_the_record() -> None:
    found = [(case.model, case.precision, case.batch_size, case.seq_len) for case in load_rivals().cases]
    assert found == [(row["model"], row["precision"], row["batch"], row["seq"]) for row in recorded()]
    for case, row in zip(load_rivals().cases, recorded(), strict=True):
        assert case.measured_peak_bytes == max(phase["peak"] for phase in row["phases"].values())  # type: ignore[attr-defined]


def test_every_tool_answers_or_says_why_not() -> None:
    rivals = load_rivals()
    assert len(rivals.tools) >= 6
    for each in rivals.tools:
        assert each.version
        assert each.source
        assert all(answer.call for answer in each.answers)
        assert all(answer.note for answer in each.answers if answer.predicted_bytes is None or answer.is_nearest)


@pytest.mark.parametrize(
    ("package", "case", "predicted_bytes"),
    [
        # ZeRO's paper and DeepSpeed's documentation: 2 + 18 bytes a parameter on one GPU without offload.
        ("deepspeed", 5, 20 * 124_439_808),
        # accelerate's documentation: four times the size of the fp32 model, whose buffers count; gpt2 without its head.
        ("accelerate", 3, 4 * 4 * 124_439_808),
    ],
)
def test_formulas_are_the_documented_ones(package: str, case: int, predicted_bytes: int) -> None:
    found = tool(package).answers[case].predicted_bytes
    assert found is not None
    assert found == pytest.approx(predicted_bytes, rel=0.03)


def test_adam_is_the_only_optimizer_of_two() -> None:
    adafactor = next(number for number, case in enumerate(load_rivals().cases) if case.optimizer == "adafactor")
    for package in ("accelerate", "deepspeed"):
        answer = tool(package).answers[adafactor]
        assert (answer.predicted_bytes, answer.note) == (None, "Adam is the only optimizer")


def test_the_most_exact_stands_first() -> None:
    rivals = compared_rivals()
    assert rivals.tools[0].title == "optplan"
    assert max(map(abs, rivals.errors(rivals.tools[0]))) < 0.01
    assert [len(each.answers) for each in rivals.tools] == [len(rivals.cases)] * len(rivals.tools)
