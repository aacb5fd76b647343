"""Situations of several GPUs, answered as somebody who has trained these models would: written before the search."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SITUATIONS = tomllib.loads((Path(__file__).parent / "situations.toml").read_text("utf-8"))["situation"]
ON_SEVERAL_GPUS = [row for row in SITUATIONS if "gpus" in row["request"]]


@pytest.mark.parametrize("situation", ON_SEVERAL_GPUS, ids=lambda row: row["id"])
def test_the_answer_is_the_one_expected(
    situation: dict[str, Any], check_situation: Callable[[dict[str, Any]], None]
) -> None:
    check_situation(situation)
