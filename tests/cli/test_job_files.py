"""Job files on the command line: `estimate --from FILE` and `recommend --export TARGET`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from optplan.app import app
from optplan.boundary import run

AXOLOTL = """
base_model: openai-community/gpt2
sequence_len: 256
micro_batch_size: 4
optimizer: adamw_bnb_8bit
learning_rate: 1e-5
bf16: true
sample_packing: true
gradient_checkpointing: false
max_grad_norm: 1.0
microbatch: 2
"""
RECOMMEND = ["recommend", "--model", "gpt2", "--gpu", "t4-16g", "--optimizer", "adamw", "--no-step-in-backward"]


@pytest.fixture
def job(tmp_path: Path) -> str:
    path = tmp_path / "train.yaml"
    path.write_text(AXOLOTL)
    return str(path)


def test_an_estimate_of_a_job_is_that_of_its_flags(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, ["estimate", "--from", job, "--gpu", "h200", "--json"]) == 0
    from_file = json.loads(capsys.readouterr().out)
    flags = "--model gpt2 --optimizer adamw-8bit --set hf_embeddings_32bit=true --seq-len 256 --batch-size 4"
    assert run(app, ["estimate", *flags.split(), "--clip-grad-norm", "1", "--gpu", "h200", "--json"]) == 0
    by_hand = json.loads(capsys.readouterr().out)
    assert from_file["estimates"] == by_hand["estimates"]
    assert from_file["config"] == by_hand["config"]
    assert from_file["notes"][-2:] == [
        "not modelled, and changes memory: sample_packing",
        "not understood: microbatch",
    ]


def test_what_is_on_the_command_line_goes_before_the_file(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--gpu", "h200", "--batch-size", "1", "-o", "sgd", "--model", "pythia-160m", "--json"]
    assert run(app, ["estimate", "--from", job, *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"]["name"] == "pythia-160m"
    assert (report["config"]["batch_size"], report["config"]["seq_len"]) == (1, 256)
    assert [row["optimizer"] for row in report["estimates"]] == ["sgd"]


def test_a_timeline_of_a_job_is_that_of_its_flags(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, ["timeline", "--from", job, "--gpu", "h200", "--json"]) == 0
    from_file = json.loads(capsys.readouterr().out)
    flags = "--model gpt2 --optimizer adamw-8bit --set hf_embeddings_32bit=true --seq-len 256 --batch-size 4"
    assert run(app, ["timeline", *flags.split(), "--clip-grad-norm", "1", "--gpu", "h200", "--json"]) == 0
    by_hand = json.loads(capsys.readouterr().out)
    assert from_file["peak_allocated_bytes"] == by_hand["peak_allocated_bytes"]
    assert from_file["notes"][-1] == "not understood: microbatch"


def test_a_search_takes_the_job_and_says_how_it_fares(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    only = ["-o", "adamw", "--precision", "amp", "--no-step-in-backward", "--checkpointing", "none"]
    assert run(app, ["recommend", "--from", job, "--gpu", "h200", "--batch-size", "2", *only, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    # Micro-batches of 4 sequences, not accumulated, are a step of 4 sequences of 256 tokens.
    assert (report["seq_len"], report["sequences_per_step"]) == (256, 4)
    config = report["recommendation"]["config"]
    assert (config["batch_size"], config["grad_accum"], config["clip_grad_norm"]) == (2, 2, 1.0)
    notes = report["notes"]
    assert notes[0].startswith("as it is written, with adamw-8bit: peak 1.")
    assert any(note.startswith(f"{job}, a job of axolotl, is read as --model openai-community/gpt2 ") for note in notes)
    assert "the command line goes before the file's --batch-size 4" in " ".join(notes)
    assert "not understood: microbatch" in notes


def test_a_search_for_a_job_counts_the_tokens_of_all_gpus(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["-o", "sgd", "--precision", "bf16", "--fused-loss", "none", "--json"]
    assert run(app, ["recommend", "--from", job, "--gpu", "h200", "--gpus", "2", *quick]) == 0
    assert json.loads(capsys.readouterr().out)["sequences_per_step"] == 8


def test_a_sweep_around_a_job(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--gpus", "h200,t4-16g", "--batch-sizes", "1,2", "--json"]
    assert run(app, ["sweep", "--from", job, *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    axes = report["axes"]
    assert (axes["model"], axes["seq_len"], axes["batch_size"]) == (["gpt2"], [256], [1, 2])
    assert (axes["optimizer"], axes["gpu"]) == (["adamw-8bit"], ["h200-141g", "t4-16g"])
    assert "the command line goes before the file's --batch-size 4" in report["notes"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("base_model: gpt2\nadapter: lora\n", "has adapter: 'lora', which trains only a part of the parameters"),
        ("optimizer: adamw\n", "is no job file of a known program; known: HF TrainingArguments, axolotl"),
        ("base_model: gpt2\nsequence_len: 0\n", "--seq-len must be an integer between 1 and 16777216, got 0"),
        ("base_model: gpt3\n", "unknown model 'gpt3'; nearest: "),
        ("a: [\n", "is not YAML: "),
    ],
)
def test_bad_files_are_one_sentence(
    text: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(text)
    assert run(app, ["estimate", "--from", str(path), "--gpu", "h200"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1


def test_a_recommendation_is_written_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, [*RECOMMEND, "--export", "hf-args"]) == 0
    out, err = capsys.readouterr()
    assert yaml.safe_load(out)["output_dir"] == "out"
    assert err.splitlines()[-1] == "optplan: start it with: python train.py training_args.yaml"


def test_a_recommendation_is_written_to_a_file_beside_the_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "accelerate.yaml"
    assert run(app, [*RECOMMEND, "--export", "accelerate", "--out", str(path)]) == 0
    assert yaml.safe_load(path.read_text())["num_processes"] == 1
    assert "Recommended: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--export", "axolot"], "unknown target for --export 'axolot'; nearest: axolotl"),
        (["--out", "x"], "--out is where --export writes: add --export TARGET"),
        (
            ["--export", "python", "--json"],
            "--json and --export both print to stdout: give --export a file with --out FILE",
        ),
        (
            ["--export", "torchtitan"],
            "--export torchtitan is not possible: it has no flavour of gpt2; it has llama-3.1-8b, ",
        ),
    ],
)
def test_bad_exports_are_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, [*RECOMMEND, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"optplan: {sentence}")
    assert err.count("\n") == 1
