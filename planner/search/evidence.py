"""How sure it is that a configuration trains well: ordered classes with reasons and citations.

Source: `data/evidence.toml`.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

import msgspec

from optplan.planner.candidates import settings_of
from optplan.planner.errors import DataError
from optplan.planner.optimizers.base import OptimizerModel
from optplan.planner.precision import PRECISIONS

EvidenceKey = tuple[int, int, int, int, int, int]
"""Ranks of the weakest part, the optimizer, the number format and the recipe, how many changes of the recipe there are,
and the optimizer's place in the table: less is surer."""

ADVENTUROUS = 2
"""The weakest class that is taken for speed or memory alone: what asks for a recipe of its own."""

_PUBLISHED_SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "micro-adam": ({},),
    "adapprox": ({}, {"rank": 32}),
    "sgd": ({}, {"momentum": 0.9}),
}
"""Settings, besides the implementation, for which somebody has shown a result; of other optimizers every setting."""


class EvidenceClass(msgspec.Struct, frozen=True):
    """One class, from the surest to the least sure."""

    key: str
    title: str
    reason: str


class OptimizerEvidence(msgspec.Struct, frozen=True, rename={"class_key": "class"}):
    """What is known of one optimizer, and what to change in the recipe; `ours` are our own runs."""

    id: str
    class_key: str
    advice: str
    source: str
    ours: str = ""


class FormatEvidence(msgspec.Struct, frozen=True, rename={"class_key": "class"}):
    """What is known of keeping numbers in one way; an empty condition holds for everything."""

    class_key: str
    reason: str
    source: str
    precisions: tuple[str, ...] = ()
    optimizers: tuple[str, ...] = ()
    state_dtypes: tuple[str, ...] = ()
    options: dict[str, Any] = {}

    def applies(self, optimizer: OptimizerModel, precision: str, state_dtype: str | None) -> bool:
        """Whether all its conditions hold."""
        return (
            (not self.precisions or precision in self.precisions)
            and (not self.optimizers or optimizer.id in self.optimizers)
            and (not self.state_dtypes or kept_dtype(precision, state_dtype) in self.state_dtypes)
            and all(optimizer.options.get(name) == value for name, value in self.options.items())
        )


class RecipeEvidence(msgspec.Struct, frozen=True, rename={"class_key": "class"}):
    """What is known of another change of the recipe."""

    key: str
    class_key: str
    reason: str
    source: str


class EvidenceTable(msgspec.Struct, frozen=True, rename={"classes": "class"}):
    """All of it."""

    classes: list[EvidenceClass]
    optimizer: list[OptimizerEvidence]
    format: list[FormatEvidence]
    recipe: list[RecipeEvidence]

    def rank_of(self, key: str) -> int:
        """Position of a class."""
        return next(rank for rank, row in enumerate(self.classes) if row.key == key)

    def place_of(self, optimizer_id: str) -> int:
        """Position of an optimizer among all."""
        return next(place for place, row in enumerate(self.optimizer) if row.id == optimizer_id)


class EvidencePart(msgspec.Struct, frozen=True):
    """What is known of one part of a configuration.

    Attributes:
        part: `optimizer`, `format`, `recipe` or `setting`.
        rank: Position of its class, 0 for the surest.
        class_title: Name of its class.
        reason: Why it is in it.
        source: A paper, or a file of this repository.
    """

    part: str
    rank: int
    class_title: str
    reason: str
    source: str


class Evidence(msgspec.Struct, frozen=True):
    """What is known of a configuration: the class of its weakest part, and every part."""

    rank: int
    class_title: str
    parts: tuple[EvidencePart, ...]


@cache
def load_evidence() -> EvidenceTable:
    """The table.

    Raises:
        DataError: The table is damaged, or names a class that it does not have.
    """
    try:
        table = tomllib.loads(files("optplan.planner.data").joinpath("evidence.toml").read_text("utf-8"))
        found = msgspec.convert(table, EvidenceTable)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise DataError(f"evidence.toml is damaged: {error}") from error
    known = {row.key for row in found.classes}
    rows = (found.optimizer, found.format, found.recipe)
    for key in (row.class_key for part in rows for row in part):
        if key not in known:
            raise DataError(f"evidence.toml is damaged: it has no class {key}")
    return found


def evidence_key(
    optimizer: OptimizerModel, precision: str, *, state_dtype: str | None, step_in_backward: bool
) -> EvidenceKey:
    """The order of configurations by what is known of them; see `EvidenceKey`."""
    table = load_evidence()
    own = table.rank_of(_row_of(optimizer.id).class_key)
    numbers = table.rank_of(format_of(optimizer, precision, state_dtype).class_key)
    recipes = [table.rank_of(row.class_key) for row in _recipes(optimizer, step_in_backward)]
    recipe = max(recipes, default=0)
    return max(own, numbers, recipe), own, numbers, recipe, len(recipes), table.place_of(optimizer.id)


def describe_evidence(
    optimizer: OptimizerModel, precision: str, *, state_dtype: str | None, step_in_backward: bool
) -> Evidence:
    """What is known of a configuration, in words."""
    table, row = load_evidence(), _row_of(optimizer.id)
    numbers = format_of(optimizer, precision, state_dtype)
    recipes = _recipes(optimizer, step_in_backward)
    own = f"{table.classes[table.rank_of(row.class_key)].reason}; {row.advice}" + (
        f"; ours: {row.ours}" if row.ours else ""
    )
    named = [
        ("optimizer", row.class_key, own, row.source),
        ("format", numbers.class_key, numbers.reason, numbers.source),
    ]
    named += [("recipe", recipe.class_key, recipe.reason, recipe.source) for recipe in recipes]
    parts = tuple(
        EvidencePart(part, table.rank_of(key), table.classes[table.rank_of(key)].title, reason, source)
        for part, key, reason, source in named
    )
    weakest = max(part.rank for part in parts)
    return Evidence(weakest, table.classes[weakest].title, parts)


def format_of(optimizer: OptimizerModel, precision: str, state_dtype: str | None) -> FormatEvidence:
    """The row on how the configuration keeps its numbers.

    Raises:
        DataError: None applies.
    """
    for row in load_evidence().format:
        if row.applies(optimizer, precision, state_dtype):
            return row
    raise DataError(f"evidence.toml says nothing of precision {precision}")


def class_of(optimizer_id: str) -> EvidenceClass:
    """The class of an optimizer alone, whatever its settings."""
    table = load_evidence()
    return table.classes[table.rank_of(_row_of(optimizer_id).class_key)]


def _row_of(optimizer_id: str) -> OptimizerEvidence:
    table = load_evidence()
    return table.optimizer[table.place_of(optimizer_id)]


def _recipes(optimizer: OptimizerModel, step_in_backward: bool) -> list[RecipeEvidence]:
    changes = {"step_in_backward"} if step_in_backward else set()
    if not _is_published(optimizer):
        changes.add("unpublished_setting")
    return [row for row in load_evidence().recipe if row.key in changes]


def _is_published(optimizer: OptimizerModel) -> bool:
    known = _PUBLISHED_SETTINGS.get(optimizer.id)
    changed = {name: value for name, value in settings_of(optimizer).items() if name != "implementation"}
    return known is None or changed in known


def kept_dtype(precision: str, asked: str | None) -> str:
    """The dtype of moments that are plain tensors: the one asked for, or that of the weights that are updated."""
    return asked or PRECISIONS[precision].updated_dtype
