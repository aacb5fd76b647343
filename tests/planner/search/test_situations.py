"""Situations of one GPU, answered as somebody who has trained these models would: written before the search existed."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SITUATIONS = tomllib.loads((Path(__file__).parent / "situations.toml").read_text("utf-8"))["situation"]
ON_ONE_GPU = [row for row in SITUATIONS if "gpus" not in row["request"]]


@pytest.mark.parametrize("situation", ON_ONE_GPU, ids=lambda row: row["id"])
def test_the_answer_is_the_one_expected(
    situation: dict[str, Any], check_situation: Callable[[dict[str, Any]], None]
) -> None:
    check_situation(situation)
