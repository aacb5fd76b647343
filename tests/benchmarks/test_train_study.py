"""The training study as a command, in the small."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "benchmarks" / "train_study.py")]


def study(*arguments: str) -> subprocess.CompletedProcess[str]:
    # The reference takes these steps, not Triton's interpreter.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(name="rows", scope="module")
def _rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("study") / "rows.jsonl"
    result = study("--out", str(out), "--device", "cpu", "--steps", "20", "--smoke", "--commit", "abc")
    assert result.returncode == 0, result.stderr
    return {row["optimizer"]: row for row in map(json.loads, out.read_text(encoding="utf-8").splitlines())}


def test_every_optimizer_leaves_a_row(rows: dict[str, Any]) -> None:
    ours = {"adamw", "adam-mini", "adapprox", "adapprox-short", "adapprox-paper"}
    assert set(rows) - {"micro-adam-official"} == ours | {
        "torch-adamw", "adam-mini-official", "micro-adam", "micro-adam-dense", "micro-adam-bf16",
    }  # fmt: skip


def test_a_row_says_what_ran(rows: dict[str, Any]) -> None:
    row = rows["adam-mini"]
    assert row["schema"] == "optplan.training/1"
    assert (row["stage"], row["seed"], row["num_steps"]) == ("final", 0, 20)
    assert [step for step, _ in row["train_losses"]] == [1, 11]
    assert [step for step, _ in row["validation_losses"]] == [0, 10, 20]
    assert row["final_validation_loss"] == row["validation_losses"][-1][1]
    assert row["environment"]["commit"] == "abc"
    assert row["environment"]["command"].endswith("--out rows.jsonl --device cpu --steps 20 --smoke --commit abc")


def test_all_start_alike_and_learn(rows: dict[str, Any]) -> None:
    starts = {row["train_losses"][0][1] for row in rows.values() if row["parameter_dtype"] == "float32"}
    assert len(starts) == 1
    assert starts.pop() == pytest.approx(math.log(256), rel=0.02)
    for row in rows.values():
        assert row["final_validation_loss"] < row["validation_losses"][0][1], row["optimizer"]


def test_equal_formulas_give_equal_losses(rows: dict[str, Any]) -> None:
    for ours, theirs in (("adamw", "torch-adamw"), ("adam-mini", "adam-mini-official")):
        assert rows[ours]["final_validation_loss"] == pytest.approx(rows[theirs]["final_validation_loss"], rel=1e-3)


def test_state_has_the_sizes_of_the_algorithms(rows: dict[str, Any]) -> None:
    per_parameter = {name: row["state_bytes"] / row["num_parameters"] for name, row in rows.items()}
    assert per_parameter["adamw"] == 8
    assert 4 < per_parameter["adam-mini"] < 4.2
    assert per_parameter["micro-adam"] < 1.1


def test_a_control_needs_what_it_controls(tmp_path: Path) -> None:
    result = study("--out", str(tmp_path / "rows.jsonl"), "--device", "cpu", "--optimizers", "adamw")
    assert result.returncode == 1
    assert result.stderr == "adamw takes its learning rate from torch-adamw: name that one too\n"
