"""`optplan sweep`: what goes to stdout, what to stderr, and the exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optplan.app import app
from optplan.boundary import run

SWEEP = ["sweep", "--models", "gpt2", "--gpus", "t4-16g,h200", "--optimizers", "adamw,sgd", "--seq-lens", "64"]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, SWEEP) == 0
    out, err = capsys.readouterr()
    assert out.startswith("model gpt2, precision bf16, seq len 64, batch size 1, checkpointing none\n")
    assert "4 of 4 fit." in out
    assert err == ""


def test_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, [*SWEEP, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "optplan.sweep/1"
    assert document["axes"]["gpu"] == ["t4-16g", "h200-141g"]
    assert [(row["gpu"], row["optimizer"]) for row in document["rows"]] == [
        ("t4-16g", "adamw"),
        ("t4-16g", "sgd"),
        ("h200-141g", "adamw"),
        ("h200-141g", "sgd"),
    ]


def test_numbers_of_gpus_and_shardings(capsys: pytest.CaptureFixture[str]) -> None:
    several = ["--gpus-per-run", "1,2", "--sharding", "ddp,fsdp2", "--precisions", "mixed", "--json"]
    assert run(app, ["sweep", "-m", "gpt2", "-g", "h200", "-o", "adamw", *several]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["gpus"], row["sharding"]) for row in rows] == [(1, "none"), (2, "ddp"), (2, "fsdp2")]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-g", "h200"], "missing option '--models' / '-m'; or give a job with --from FILE"),
        (["-m", "gpt2,", "-g", "h200"], "--models takes values separated by commas, got 'gpt2,'"),
        (["-m", "gpt2", "-g", "h200", "-s", "64,x"], "--seq-len must be an integer between 1 and 16777216, got 'x'"),
    ],
)
def test_bad_lists_are_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, ["sweep", *arguments]) == 2
    assert capsys.readouterr() == ("", f"optplan: {sentence}\n")


def test_csv_to_a_file_and_to_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, [*SWEEP, "--csv", str(tmp_path / "sweep.csv")]) == 0
    assert capsys.readouterr().out == ""
    assert run(app, [*SWEEP, "--csv", "-"]) == 0
    assert capsys.readouterr().out == (tmp_path / "sweep.csv").read_text()


@pytest.mark.parametrize(
    ("budget", "status", "num_lines"), [("10GiB", 0, 0), ("1000MiB", 1, 2), ("100MiB", 1, 4)], ids=str
)
def test_ci_prints_a_line_for_each_violation(
    budget: str, status: int, num_lines: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(app, [*SWEEP, "--ci", "--budget", budget]) == status
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == num_lines
    assert err == ""


def test_ci_leaves_stdout_to_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, [*SWEEP, "--ci", "--budget", "100MiB", "--json"]) == 1
    out, err = capsys.readouterr()
    assert len(json.loads(out)["rows"]) == 4
    assert err.startswith("gpt2 on t4-16g: adamw (fused), batch 1, sequence 64, bf16, checkpointing none: needs ")
    assert len(err.splitlines()) == 4


def test_without_ci_one_fitting_row_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, [*SWEEP, "--budget", "1000MiB"]) == 0
    assert run(app, [*SWEEP, "--budget", "100MiB"]) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--models", "gpt2,"], "--models takes values separated by commas, got 'gpt2,'"),
        (["--batch-sizes", "1,many"], "--batch-size must be an integer between 1 and 1048576, got 'many'"),
        (["--csv", "-", "--json"], "--json and --csv - both print to stdout: give --csv a file"),
        (["--optimizers", "adamv"], "unknown optimizer 'adamv'; nearest: adamw"),
        (["--gpus", "h201"], "unknown GPU 'h201'; nearest: h200"),
        (["--budget", "38"], "size '38' is not a number with a unit; write it like 38GiB (2^30) or 40GB (10^9)"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, [*SWEEP, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"optplan: {sentence}")
    assert err.count("\n") == 1
