"""Which configuration of the front is taken: one stated rule for each preference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from optplan.planner.search.evidence import ADVENTUROUS, EvidenceKey

T = TypeVar("T")

ALIKE_SECONDS = 0.05
"""Times that differ by less are alike: the median error of the time model."""
ALIKE_BYTES = 0.01
"""Peaks that differ by less are alike."""
MOST_SLOWER = 2.0
"""How much slower than the quickest a surer configuration may be."""

RULES = {
    "quality": (
        "the surest evidence first, as long as a step takes at most twice the quickest one's time; then the quickest; "
        f"among times within {ALIKE_SECONDS:.0%} the one that changes least, then the smallest peak"
    ),
    "speed": (
        "the quickest, leaving out evidence beyond 'own recipe' if anything else fits; "
        f"among times within {ALIKE_SECONDS:.0%} the surest evidence, then the one that changes least"
    ),
    "memory": (
        "the smallest peak, leaving out evidence beyond 'own recipe' if anything else fits; "
        f"among peaks within {ALIKE_BYTES:.0%} the surest evidence, then the quickest"
    ),
}


class Ranked(NamedTuple):
    """What the rules look at.

    Attributes:
        key: The evidence.
        seconds: Time for the tokens of one step.
        peak_bytes: Memory.
        num_changes: How many things differ from a plain step with the optimizer's defaults.
    """

    key: EvidenceKey
    seconds: float
    peak_bytes: int
    num_changes: int


Entry = tuple[Ranked, T]


def in_order(entries: Sequence[Entry[T]], prefer: str) -> list[T]:
    """The entries from the one to take to the last, by the rule of a preference."""
    usual = [entry for entry in entries if entry[0].key[0] <= ADVENTUROUS]
    rest = [entry for entry in entries if entry[0].key[0] > ADVENTUROUS]
    return [item for part in (usual, rest) if part for _, item in _ordered(part, prefer)]


def _ordered(entries: list[Entry[T]], prefer: str) -> list[Entry[T]]:
    if prefer == "memory":
        least = min(ranked.peak_bytes for ranked, _ in entries)
        return sorted(entries, key=lambda entry: _by_memory(entry[0], least))
    quickest = min(ranked.seconds for ranked, _ in entries)
    if prefer == "speed":
        return sorted(entries, key=lambda entry: _by_speed(entry[0], quickest))
    best: dict[EvidenceKey, float] = {}
    for ranked, _ in entries:
        best[ranked.key] = min(ranked.seconds, best.get(ranked.key, ranked.seconds))
    return sorted(entries, key=lambda entry: _by_quality(entry[0], best[entry[0].key], quickest))


def _by_memory(ranked: Ranked, least: int) -> tuple[object, ...]:
    return _step(ranked.peak_bytes, least, ALIKE_BYTES), ranked.key, ranked.seconds, ranked.num_changes


def _by_speed(ranked: Ranked, quickest: float) -> tuple[object, ...]:
    return _step(ranked.seconds, quickest, ALIKE_SECONDS), ranked.key, ranked.num_changes, ranked.peak_bytes


def _by_quality(ranked: Ranked, best: float, quickest: float) -> tuple[object, ...]:
    too_slow = ranked.seconds > MOST_SLOWER * quickest
    alike = _step(ranked.seconds, best, ALIKE_SECONDS)
    return too_slow, ranked.key, alike, ranked.num_changes, ranked.peak_bytes


def _step(value: float, least: float, alike: float) -> int:
    """How many times a value must be made smaller by what counts as alike to reach the least."""
    return math.floor(math.log(value / least) / math.log1p(alike) + 1e-9)
