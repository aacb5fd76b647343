"""The facts of the optimizers: one row for every id of the registry, whole and dated."""

from __future__ import annotations

import re
from datetime import date

import pytest

from optplan.planner.optimizers.facts import OptimizerFacts, load_facts
from optplan.planner.optimizers.registry import OPTIMIZERS


def test_every_optimizer_has_a_row_and_every_row_an_optimizer() -> None:
    assert {row.id: row.title for row in load_facts().values()} == {id_: e.title for id_, e in OPTIMIZERS.items()}


@pytest.mark.parametrize("row", load_facts().values(), ids=load_facts())
def test_rows_are_whole(row: OptimizerFacts) -> None:
    assert 2010 <= row.year <= date.fromisoformat(row.as_of).year
    assert row.source.startswith("https://")
    assert re.search(r"\d", row.defaults)
    for text in (row.evidence, row.limits):
        assert re.fullmatch(r"[^\s].*\.", text)
        assert 1 <= len(re.findall(r"[.](?:\s|$)", text)) <= 3


def test_papers_on_arxiv_are_named_by_number() -> None:
    numbers = {id_: re.findall(r"arXiv:(\d{4}\.\d{5})$", row.paper or "") for id_, row in load_facts().items()}
    assert {id_ for id_, found in numbers.items() if not found} == {"sgd", "adamw-fp8"}
    assert (numbers["adamw"], numbers["micro-adam"]) == (["1711.05101"], ["2405.15593"])
    assert (numbers["adam-mini"], numbers["adapprox"]) == (["2406.16793"], ["2403.14958"])
