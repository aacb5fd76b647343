"""Evidence is data: ordered classes with reasons and sources, complete and consistent with our own records."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest

from optplan.planner.optimizers.registry import build_optimizer, optimizer_ids
from optplan.planner.search.evidence import describe_evidence, evidence_key, load_evidence

ROOT = Path(__file__).resolve().parents[3]


def test_every_optimizer_has_one_row() -> None:
    assert sorted(row.id for row in load_evidence().optimizer) == sorted(optimizer_ids())


def test_the_classes_go_from_the_surest() -> None:
    assert [row.key for row in load_evidence().classes] == ["reference", "same-recipe", "own-recipe", "restricted"]


def test_every_row_has_a_source() -> None:
    table = load_evidence()
    sources = [row.source for part in (table.optimizer, table.format, table.recipe) for row in part]
    assert all(source.startswith("https://") or (ROOT / source).exists() for source in sources)


@pytest.mark.parametrize(
    ("optimizer", "options", "precision", "state_dtype", "in_backward", "title"),
    [
        ("adamw", {}, "amp", None, False, "reference"),
        ("adamw", {}, "mixed", None, False, "reference"),
        ("adamw", {}, "bf16", None, False, "own recipe"),
        ("adamw", {"implementation": "optplan", "rounding": "stochastic"}, "bf16", None, False, "same recipe"),
        # What rounding takes from a parameter is kept, but a second moment in bf16 still cannot decay.
        ("adamw", {"implementation": "optplan", "rounding": "kahan"}, "bf16", None, False, "own recipe"),
        ("adamw", {"implementation": "optplan", "rounding": "kahan"}, "bf16", "float32", False, "same recipe"),
        ("adamw", {"implementation": "optplan"}, "fp32", "bfloat16", False, "own recipe"),
        ("adamw-8bit", {}, "amp", None, False, "same recipe"),
        ("micro-adam", {}, "amp", None, False, "own recipe"),
        ("micro-adam", {"window": 5}, "amp", None, False, "restricted"),
        ("adapprox", {"rank": 32}, "amp", None, False, "own recipe"),
        ("adamw", {}, "amp", None, True, "restricted"),
        ("galore", {}, "amp", None, False, "restricted"),
    ],
)  # fmt: skip
def test_the_weakest_part_decides(
    optimizer: str, options: dict[str, object], precision: str, state_dtype: str | None, in_backward: bool, title: str
) -> None:
    built = build_optimizer(optimizer, options)
    evidence = describe_evidence(built, precision, state_dtype=state_dtype, step_in_backward=in_backward)
    assert evidence.class_title == title
    assert evidence.rank == max(part.rank for part in evidence.parts)
    key = evidence_key(built, precision, state_dtype=state_dtype, step_in_backward=in_backward)
    assert key[0] == evidence.rank


@pytest.mark.parametrize(
    ("optimizer", "figure"),
    [("adamw", "1.1815"), ("adam-mini", "1.2566"), ("micro-adam", "2.1632"), ("adapprox", "1.1989")],
)
def test_our_own_losses_are_those_of_the_records(optimizer: str, figure: str) -> None:
    lines = (ROOT / "benchmarks" / "records" / "h200_training.jsonl").read_text("utf-8").splitlines()
    recorded = "torch-adamw" if optimizer == "adamw" else optimizer
    rows = [json.loads(line) for line in lines]
    ran = [row for row in rows if row["optimizer"] == recorded and row["stage"] == "final"]
    newest = ran[-1]["environment"]["commit"]
    losses = [row["final_validation_loss"] for row in ran if row["environment"]["commit"] == newest]
    row = next(row for row in load_evidence().optimizer if row.id == optimizer)
    assert f"{fmean(losses):.4f}" == figure
    assert figure in row.ours
