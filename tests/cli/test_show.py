"""`optplan show`: what every command prints with --json is shown again as the command itself shows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optplan.app import app
from optplan.boundary import run

ROOT = Path(__file__).resolve().parents[2]
RECORD = str(ROOT / "docs" / "examples" / "h200_step.json.gz")
GPT2 = ["--model", "gpt2", "--gpu", "a100-40g"]
COMMANDS = [
    ["estimate", *GPT2, "--optimizer", "adamw"],
    ["recommend", *GPT2, "--optimizer", "adamw", "--precision", "bf16", "--checkpointing", "none"],
    ["sweep", "--models", "gpt2", "--gpus", "a100-40g", "--optimizers", "adamw", "--batch-sizes", "1,2"],
    ["timeline", *GPT2, "--optimizer", "adamw"],
    ["explain", *GPT2, "--optimizer", "adamw"],
    ["compare", RECORD, RECORD],
    ["replay", str(ROOT / "tests" / "records" / "h200_histories" / "training.json.gz")],
    ["models"],
    ["gpus"],
    ["optimizers"],
    ["published"],
]


def _printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert run(app, list(arguments)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_an_answer_is_shown_again(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    path = tmp_path / "answer.json"
    path.write_text(_printed(capsys, *command, "--json"))
    assert _printed(capsys, "show", str(path)) == _printed(capsys, *command)
    assert json.loads(_printed(capsys, "show", str(path), "--json")) == json.loads(path.read_text())


def test_a_validation_is_shown_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = tmp_path / "records"
    records.mkdir()
    (records / "step.json.gz").write_bytes(Path(RECORD).read_bytes())
    command = ["validate", "--records", str(records), "--check"]
    path = tmp_path / "answer.json"
    path.write_text(_printed(capsys, *command, "--json"))
    assert _printed(capsys, "show", str(path)) == _printed(capsys, *command)


@pytest.mark.parametrize("command", [["compare"], ["report"], ["show", "--html", "page.html"]], ids=" ".join)
def test_what_is_no_step_is_no_page_and_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("answer.json").write_text(_printed(capsys, "gpus", "--json"))
    assert run(app, [*command, "answer.json"]) == 2
    assert capsys.readouterr().err == (
        "optplan: 'answer.json' has schema 'optplan.gpus/1', which is no record of a step and is read by show alone; "
        "allowed: optplan.estimate/1, optplan.measurement/1\n"
    )
    assert not Path("page.html").exists()


@pytest.mark.parametrize("num_lines", [1, 2])
@pytest.mark.parametrize(
    "command",
    [["show"], ["compare", RECORD], ["report", RECORD], ["report"]],
    ids=lambda command: f"{command[0]}{len(command)}",
)
def test_times_of_further_processes_are_no_record(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    num_lines: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("step_times.jsonl").write_text('{"schema":"optplan.step-times/1","record":"step"}\n' * num_lines)
    assert run(app, [*command, "step_times.jsonl"]) == 2
    assert capsys.readouterr().err == (
        "optplan: 'step_times.jsonl' is no record but times of recorded steps in further processes, a line each; "
        "`optplan validate --check --records` on their folder judges the records by them\n"
    )


def test_times_of_further_processes_are_no_damaged_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "step.json.gz").write_bytes(Path(RECORD).read_bytes())
    (tmp_path / "step_times.jsonl").write_text("")
    answer = json.loads(_printed(capsys, "validate", "--records", str(tmp_path), "--check", "--json"))
    assert ([row["record"] for row in answer["judgements"]], answer["skipped"]) == (["step"], {})


def test_a_time_that_no_clock_can_show_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    # An early record says that its whole step took -1.28 microseconds; its phases are right.
    text = _printed(capsys, "show", RECORD)
    assert "-0.00 ms" not in text and "-1,600,000,040" not in text
    note = "measured: the time of the whole step is not measured: by the record's own clock it ends before it begins"
    assert note in " ".join(text.split())
    time = json.loads(_printed(capsys, "show", RECORD, "--json"))["time"]
    assert (time["step_seconds"], time["tokens_per_second"]) == (None, None)
    assert time["phases"]["forward"] == 0.022629215240478517
