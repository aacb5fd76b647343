"""What is known of each optimizer beyond its memory: origin, defaults, evidence, limits.

Source: `data/optimizers.toml`, one table an optimizer.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files

import msgspec

from optplan.planner.errors import DataError


class OptimizerFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One optimizer's row.

    Attributes:
        id: Name in the registry.
        title: Name for people.
        year: Year of the first public version.
        source: Address of the paper or the repository.
        defaults: Hyperparameters that users keep when they change nothing.
        evidence: Who showed that it trains well, and how sure that is.
        limits: Where it fails or saves less than it seems.
        as_of: Day on which the row was written, `YYYY-MM-DD`.
        paper: Title and place of the paper, None where there is none.
    """

    id: str
    title: str
    year: int
    source: str
    defaults: str
    evidence: str
    limits: str
    as_of: str
    paper: str | None = None


@cache
def load_facts() -> dict[str, OptimizerFacts]:
    """The row of every optimizer by id.

    Raises:
        DataError: The table is damaged, or an id stands in it twice.
    """
    try:
        table = tomllib.loads(files("optplan.planner.data").joinpath("optimizers.toml").read_text("utf-8"))
        rows = msgspec.convert(table["optimizer"], list[OptimizerFacts])
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, KeyError) as error:
        raise DataError(f"optimizers.toml is damaged: {error}") from error
    facts = {row.id: row for row in rows}
    if len(facts) != len(rows):
        twice = next(row.id for row in rows if [other.id for other in rows].count(row.id) > 1)
        raise DataError(f"optimizers.toml has two rows with the id {twice}")
    return facts
