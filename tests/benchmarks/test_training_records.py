"""The committed training runs, and what the documents say of them, recomputed from the rows."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINES = (ROOT / "benchmarks" / "records" / "h200_training.jsonl").read_text(encoding="utf-8").splitlines()
ROWS: list[dict[str, Any]] = [json.loads(line) for line in LINES]
SWEPT = ("torch-adamw", "adam-mini", "adapprox", "micro-adam")


def runs_of(name: str) -> list[dict[str, Any]]:
    """Rows of an optimizer, of its newest commit."""
    rows = [row for row in ROWS if row["optimizer"] == name]
    return [row for row in rows if row["environment"]["commit"] == rows[-1]["environment"]["commit"]]


def final_losses(name: str) -> dict[int, float]:
    """Losses at the best learning rate by seed."""
    return {row["seed"]: row["final_validation_loss"] for row in runs_of(name) if row["stage"] == "final"}


def mean_loss(name: str) -> float:
    losses = final_losses(name)
    return sum(losses.values()) / len(losses)


def test_every_row_says_where_it_was_measured() -> None:
    for row in ROWS:
        place = row["environment"]
        assert row["schema"] == "optplan.training/1"
        assert place["gpu"] == "NVIDIA H200"
        assert re.fullmatch(r"[0-9a-f]{40}|2776dfb", place["commit"])
        assert place["command"].startswith("python benchmarks/train_study.py --out ")
        assert row["final_validation_loss"] in (None, row["validation_losses"][-1][1])
        assert row["validation_losses"][-1][0] == row["num_steps"]


def test_all_runs_had_one_text_model_and_start() -> None:
    assert len({row["corpus"]["sha256"] for row in ROWS}) == 1
    assert len({json.dumps(row["recipe"]) for row in ROWS}) == 1
    starts: dict[tuple[int, str], list[float]] = defaultdict(list)
    for row in ROWS:
        starts[row["seed"], row["parameter_dtype"]].append(row["train_losses"][0][1])
    for losses in starts.values():
        assert max(losses) - min(losses) < 1e-3


@pytest.mark.parametrize("name", SWEPT)
def test_the_learning_rate_is_the_best_of_its_sweep(name: str) -> None:
    tried = {row["lr"]: row["final_validation_loss"] for row in runs_of(name) if row["seed"] == 0}
    chosen = {row["lr"] for row in runs_of(name) if row["stage"] == "final"}
    best = min(tried, key=lambda lr: tried[lr])
    assert chosen == {best}
    assert {best / 2, best * 2} <= set(tried), "the best learning rate has no neighbour on one side"
    assert set(final_losses(name)) == {0, 1, 2}


@pytest.mark.parametrize("name", ["adam-mini-official", "micro-adam-official", "micro-adam-bf16", "adapprox-paper"])
def test_controls_ran_at_the_learning_rate_of_what_they_control(name: str) -> None:
    (leader,) = {row["follows"] for row in runs_of(name)}
    assert {row["lr"] for row in runs_of(name)} == {row["lr"] for row in runs_of(leader) if row["stage"] == "final"}


@pytest.mark.parametrize(
    ("ours", "theirs", "most"),
    [
        ("adamw", "torch-adamw", 0.005),
        ("adam-mini", "adam-mini-official", 0.01),
        ("micro-adam-bf16", "micro-adam-official", 0.01),
        ("adapprox-short", "adapprox-paper", 0.01),
    ],
)
def test_losses_are_those_of_the_authors_code(ours: str, theirs: str, most: float) -> None:
    for seed, loss in final_losses(theirs).items():
        assert final_losses(ours)[seed] == pytest.approx(loss, rel=most)


def test_adapprox_is_within_two_percent_of_adamw() -> None:
    assert mean_loss("adapprox") / mean_loss("torch-adamw") < 1.02


@pytest.mark.parametrize(
    ("title", "name"),
    [("`AdamW`", "adamw"), ("`AdamMini`", "adam-mini"), ("`Adapprox`, rank 32", "adapprox"),
     ("`MicroAdam`, window 10, density 1 %", "micro-adam")],
)  # fmt: skip
def test_the_readme_states_the_recorded_losses(title: str, name: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = [line for line in readme.splitlines() if line.startswith(f"| {title} |")]
    stated = float(line.split("|")[-2].removesuffix(" % ").strip())
    assert stated == pytest.approx(100 * (mean_loss(name) / mean_loss("torch-adamw") - 1), abs=0.051)
