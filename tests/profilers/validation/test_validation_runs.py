"""A matrix of steps measured in processes of their own: what is measured, kept, left out, and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optplan.app import app
from optplan.boundary import run
from optplan.planner.errors import ConfigError
from optplan.planner.estimate import estimate
from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.record_files import load_record
from optplan.profilers.validation.command import _preloaded
from optplan.profilers.validation.launching import ForkLauncher, launching
from optplan.profilers.validation.matrix import ValidationCase, matrix_names, read_matrix, refusal
from optplan.profilers.validation.runner import Limits, Progress, run_cases

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "max_position_embeddings": 64,
}
STEP = {"batch_size": 1, "seq_len": 8}
RECORDS = Path(__file__).parents[2] / "records"


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    return str(path)


def test_steps_that_do_not_fit_or_cannot_be_run_are_told_why() -> None:
    large = ValidationCase("llama-2-7b", "adamw", (), {"seq_len": 512})
    strange = ValidationCase("pythia-1b", "adam-mini", ("implementation=official",), {"seq_len": 512})
    assert [refusal(case, gpu="a100-40g") for case in read_matrix("quick")] == [None] * 4
    assert refusal(large, gpu="a100-40g") == "it does not fit"
    assert (refusal(strange, gpu="a100-40g") or "").startswith("adam-mini 1.1.1 fails on gpt_neox")


def test_no_two_cases_share_a_record() -> None:
    for name in matrix_names():
        cases = read_matrix(name)
        assert len({case.name for case in cases}) == len(cases) > 0


def test_the_full_matrix_has_what_is_promised() -> None:
    cases = read_matrix("full")
    assert len(cases) >= 60
    assert len({case.model for case in cases}) >= 8
    assert {case.step.get("precision", "bf16") for case in cases} >= {"bf16", "fp32", "amp"}
    assert {case.step.get("checkpointing", "none") for case in cases} == {"none", "full"}


def test_the_public_matrix_has_the_steps_that_public_libraries_measured() -> None:
    names = {"adamw_foreach": ("adamw", "foreach"), "adam_mini": ("adam-mini", "official")}
    names["adafactor"] = ("adafactor", "transformers")
    expected = []
    for line in (RECORDS / "public_h200_times.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        optimizer, implementation = names.get(row["optimizer"], (row["optimizer"], "fused"))
        checkpointing = "full" if row["checkpointing"] else "none"
        step = (row["precision"], row["batch"], row["seq"], checkpointing, row["attention"])
        expected.append((row["model"], optimizer, implementation, *step))
    found = []
    for case in read_matrix("public"):
        report = estimate(case.model, gpu="h200", optimizer=case.optimizer, options=list(case.settings), **case.step)
        config, entry = report.config, report.estimates[0]
        step = (config.precision, config.batch_size, config.seq_len, config.checkpointing, config.attention)
        found.append((case.model, entry.optimizer, entry.implementation, *step))
    assert sorted(found) == sorted(expected)


def test_an_unknown_matrix() -> None:
    with pytest.raises(ConfigError, match=r"^unknown matrix 'fll'; nearest: full$"):
        read_matrix("fll")


def test_the_command_line_of_a_case() -> None:
    case = ValidationCase("gpt2", "adamw", ("implementation=foreach",), {"batch_size": 2})
    assert case.arguments == [
        "--model", "gpt2", "--optimizer", "adamw", "--set", "implementation=foreach", "--batch-size", "2",
    ]  # fmt: skip
    assert case.name == "gpt2_adamw_implementation=foreach_batch_size=2"


def test_a_run_goes_on_where_it_ended(config: str, tmp_path: Path) -> None:
    good = ValidationCase(config, "sgd", ("implementation=foreach",), STEP)
    together = ValidationCase(config, "adamw", (), {**STEP, "sharding": "ddp"}, 2)
    bad = ValidationCase(config, "lion", (), STEP)
    cases, folder, told = [good, together, bad], tmp_path / "records", list[Progress]()
    with launching(_preloaded(cases)) as launcher:
        assert isinstance(launcher, ForkLauncher)
        first = run_cases(cases, folder, launcher=launcher, device="cpu", limits=Limits(3, 600), progress=told.append)
        second = run_cases(cases, folder, launcher=launcher, device="cpu", limits=Limits(3, -1))
    assert first.measured == [good.name, together.name]
    assert list(first.failed) == [bad.name]
    assert first.failed[bad.name].startswith("optplan: lion (pytorch_optimizer) cannot be run by the profiler")
    assert [(now.done, now.total) for now in told] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    records = [load_record(folder / f"{case.name}.json.gz") for case in (good, together)]
    assert all(isinstance(record, Measurement) and record.history is None for record in records)
    assert [len(record.ranks) for record in records if isinstance(record, Measurement)] == [0, 2]
    assert (second.measured, second.kept, second.left) == ([], [good.name, together.name], [bad.name])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--records", "none", "--check"], "--records 'none' is no folder"),
        (
            ["--records", ".", "--check", "--measure-only"],
            "--check and --measure-only exclude each other: nothing would be done",
        ),
        (["--records", ".", "--check"], "--records '.' holds no record"),
        (["--records", ".", "--matrix", "quik", "--device", "cpu"], "unknown matrix 'quik'; nearest: quick"),
        (["--records", ".", "--minutes", "0", "--device", "cpu"], "--minutes must be above 0, got 0.0"),
        (
            ["--records", ".", "--steps", "1", "--device", "cpu"],
            "--steps must be at least 3, the last of which is recorded; got 1",
        ),
        (
            ["--records", ".", "--gpus-in-parallel", "0", "--device", "cpu"],
            "--gpus-in-parallel must be at least 1, got 0",
        ),
        (
            ["--records", ".", "--gpus-in-parallel", "2", "--device", "cpu"],
            "--gpus-in-parallel 2 goes with --device cuda, got 'cpu'",
        ),
    ],
)
def test_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(app, ["validate", *arguments]) == 2
    assert capsys.readouterr().err == f"optplan: {sentence}\n"
