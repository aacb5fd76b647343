"""Memory of steps on many GPUs that others have published, each between two settings of ours.

Source: `data/published.toml`, tables `step`.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

import msgspec


class PublishedStep(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One published step.

    Attributes:
        id: Name of the row.
        source: Address of the page.
        where: Table and row.
        value_gib: The printed number, GiB reserved.
        model: Catalogue id.
        step: How the step is run, as `StepFlags`.
        between: Values of `checkpointing` whose estimates enclose the number, the smaller first.
        differs: What of the step is not modelled.
    """

    id: str
    source: str
    where: str
    value_gib: float
    model: str
    step: dict[str, Any]
    between: tuple[str, str]
    differs: str


@cache
def published_steps() -> tuple[PublishedStep, ...]:
    """All rows, in their order."""
    text = files("optplan.planner.data").joinpath("published.toml").read_text(encoding="utf-8")
    return tuple(msgspec.convert(row, PublishedStep) for row in tomllib.loads(text)["step"])
