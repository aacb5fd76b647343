"""`optplan recommend` as people call it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import msgspec
import pytest

from optplan.app import app
from optplan.boundary import run
from optplan.planner.search.records import SearchReport

ROOT = Path(__file__).parents[2]
QUICK = ["--optimizer", "adamw", "--optimizer", "micro-adam"]


def ask(arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, SearchReport]:
    status = run(app, [*shlex.split(arguments), "--json"])
    out, err = capsys.readouterr()
    assert err == ""
    return status, msgspec.json.decode(out, type=SearchReport)


def test_a_7b_model_on_a_40_gb_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, ["recommend", "--model", "llama-7b", "--gpu", "a100-40g"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "Recommended: micro-adam, bf16, micro-batch " in out
    assert "Runner-up: " in out
    assert "24,120 configurations decided" in out


def test_the_json_is_the_committed_schema(capsys: pytest.CaptureFixture[str]) -> None:
    _, report = ask("recommend -m gpt2 -g t4-16g -o adamw", capsys)
    schema = json.loads((ROOT / "docs" / "schemas" / "recommend.json").read_text("utf-8"))
    assert msgspec.json.schema(SearchReport) == schema
    assert report.schema == "optplan.recommend/1"


def test_the_recommended_command_prints_the_same_peak(capsys: pytest.CaptureFixture[str]) -> None:
    _, report = ask("recommend -m llama-7b -g a100-40g -o micro-adam", capsys)
    best = report.recommendation
    assert best is not None
    assert run(app, [*shlex.split(best.command)[1:], "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["estimates"]
    assert row["peak_allocated_bytes"] == best.peak_allocated_bytes
    assert row["peak_reserved_bytes"] == best.peak_reserved_bytes
    assert best.time is not None
    assert row["step_seconds"]["step"] == pytest.approx(best.time.step_seconds)


def test_what_is_fixed_is_not_searched(capsys: pytest.CaptureFixture[str]) -> None:
    fixed = "--precision amp --checkpointing full --batch-size 2 --fused-loss none --no-step-in-backward"
    _, report = ask(f"recommend -m tinyllama-1.1b -g l4-24g {fixed} -o adamw --tokens-per-step 8192", capsys)
    assert report.recommendation is not None
    config = report.recommendation.config
    assert (config.precision, config.checkpointing, config.batch_size, config.grad_accum) == ("amp", "full", 2, 2)
    assert report.space.fixed["precision"] == "amp"


def test_a_state_dtype_that_is_given_counts_as_evidence(capsys: pytest.CaptureFixture[str]) -> None:
    _, report = ask("recommend -m tinyllama-1.1b -g l4-24g -o adamw --precision amp --state-dtype bf16", capsys)
    best = report.recommendation
    assert best is not None
    # A second moment in bf16 cannot decay with beta2 = 0.999.
    assert (best.state_dtype, best.evidence.class_title) == ("bfloat16", "own recipe")
    assert "--state-dtype bf16" in best.command


@pytest.mark.parametrize("prefer", ["speed", "quality", "memory"])
def test_preferences_pick_from_one_front(prefer: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, report = ask(f"recommend -m tinyllama-1.1b -g l4-24g --prefer {prefer} {shlex.join(QUICK)}", capsys)
    best = report.recommendation
    assert best is not None and best.time is not None
    timed = [(row, row.time) for row in report.front if row.time and row.evidence.rank <= 2]
    if prefer == "memory":
        assert best.peak_allocated_bytes <= 1.04 * min(row.peak_allocated_bytes for row, _ in timed)
    if prefer == "speed":
        assert best.time.step_seconds <= 1.11 * min(time.step_seconds for _, time in timed)
    if prefer == "quality":
        assert best.evidence.rank == min(row.evidence.rank for row, _ in timed)


def test_budget_and_reserve_lower_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    _, report = ask(f"recommend -m tinyllama-1.1b -g l4-24g --budget 12GiB --reserve 2GiB {shlex.join(QUICK)}", capsys)
    assert report.limit_bytes == 10 * 2**30
    assert report.recommendation is not None
    assert report.recommendation.peak_reserved_bytes is not None
    assert report.recommendation.peak_reserved_bytes <= 0.98 * report.limit_bytes


def test_explain_accounts_for_every_member_of_the_space(capsys: pytest.CaptureFixture[str]) -> None:
    asked = f"recommend -m llama-7b -g a100-40g --explain {shlex.join(QUICK)}"
    _, report = ask(asked, capsys)
    # AdamW in 3 implementations of torch's, ours with 3 roundings and 3 state dtypes; MicroAdam's 9 settings and the
    # authors'; under 5 precisions.
    assert len(report.alternatives) == (3 + 3 * 3 + 9 + 1) * 5
    assert [row.outcome for row in report.alternatives].count("recommended") == 1
    for row in report.alternatives:
        assert row.reason
        assert (row.outcome == "beaten") == (row.beaten_by is not None)
        if row.beaten_by is not None:
            assert row.best is not None
            assert row.beaten_by.peak_allocated_bytes <= 1.05 * row.best.peak_allocated_bytes
    adamw = next(row for row in report.alternatives if row.optimizer == "adamw" and row.precision == "fp32")
    assert adamw.outcome == "does not fit"
    assert adamw.reason.startswith("needs at least ")


def test_nothing_fits_and_what_would_is_confirmed(capsys: pytest.CaptureFixture[str]) -> None:
    status, report = ask("recommend -m llama-2-7b -g a100-40g -o adamw --precision amp --seq-len 512", capsys)
    assert (status, report.recommendation) == (1, None)
    assert [change.direction for change in report.what_would_fit] == ["gpu", "gpus", "precision", "optimizer"]
    change = next(change for change in report.what_would_fit if change.direction == "gpu")
    status, report = ask(" ".join(shlex.split(change.command)[1:]), capsys)
    assert status == 0


def test_where_no_single_change_helps_several_do(capsys: pytest.CaptureFixture[str]) -> None:
    # Under autocast each of 64 GPUs would still cast all 141 GB of weights: the number formats must be free, too.
    status, report = ask("recommend -m llama-3-70b -g a100-80g -o adamw --precision amp --budget 60GiB", capsys)
    assert status == 1
    (change,) = report.what_would_fit
    assert change.direction == "together"
    assert change.text == "8 of a100-80g with --sharding fsdp2; number formats and optimizer left free"
    assert "--precision" not in change.command


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--gpus 8..1", "--gpus takes a number or a range such as 1..8, got '8..1'"),
        ("--gpus many", "--gpus takes a number or a range such as 1..8, got 'many'"),
        ("--gpus 4096", "--gpus 4096 is beyond the 1024 that are searched"),
        ("--prefer cheap", "unknown preference for --prefer 'cheap'; known: quality, speed, memory"),
        ("--budget 0", "--budget must be more than 0, got '0'"),
        ("--sharding fsdp2", "--sharding fsdp2 needs --gpus of at least 2, got 1"),
        (
            "--step-in-backward --clip-grad-norm 1",
            "--step-in-backward and --clip-grad-norm contradict each other: the norm of all gradients needs all of "
            "them",
        ),
        ("--reserve 200GiB", "--reserve 200.00 GiB leaves nothing of 38.73 GiB"),
        ("--tokens-per-step 3000", "--tokens-per-step 3000 is not a whole number of sequences of 2048 tokens"),
        (
            "--tokens-per-step 6144 --batch-size 2",
            "--tokens-per-step 6144 makes 3 sequences, which micro-batches of 2 on 1 GPUs do not divide",
        ),
    ],
)
def test_bad_input_is_one_sentence(arguments: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, ["recommend", "-m", "llama-7b", "-g", "a100-40g", *shlex.split(arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"optplan: {sentence}\n"


def test_without_step_rules_nothing_is_searched(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, ["recommend", "-m", "bloom-560m", "-g", "a100-40g"]) == 2
    sentence = "bloom models have no step rules in this version: nothing can be searched"
    assert capsys.readouterr().err == f"optplan: {sentence}\n"
