"""Which configuration of the front is taken: one stated rule for each preference."""

from __future__ import annotations

import math
from collections.abc import Sequence

from optplan.planner.search.evidence import ADVENTUROUS
from optplan.planner.search.explore import Found

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


def in_order(front: Sequence[Found], prefer: str) -> list[Found]:
    """The configurations from the one to take to the last, by the rule of a preference."""
    usual = [found for found in front if found.key[0] <= ADVENTUROUS]
    rest = [found for found in front if found.key[0] > ADVENTUROUS]
    return _ordered(usual, prefer) + _ordered(rest, prefer)


def _ordered(front: list[Found], prefer: str) -> list[Found]:
    if not front:
        return []
    quickest = min(found.seconds for found in front)
    if prefer == "memory":
        least = min(found.peak_bytes for found in front)
        return sorted(front, key=lambda f: (_step(f.peak_bytes, least, ALIKE_BYTES), f.key, f.seconds, _changes(f)))
    if prefer == "speed":
        return sorted(
            front, key=lambda f: (_step(f.seconds, quickest, ALIKE_SECONDS), f.key, _changes(f), f.peak_bytes)
        )
    return sorted(front, key=lambda found: _by_quality(found, front, quickest))


def _by_quality(found: Found, front: list[Found], quickest: float) -> tuple[object, ...]:
    best = min(other.seconds for other in front if other.key == found.key)
    too_slow = found.seconds > MOST_SLOWER * quickest
    return too_slow, found.key, _step(found.seconds, best, ALIKE_SECONDS), _changes(found), found.peak_bytes


def _step(value: float, least: float, alike: float) -> int:
    """How many times a value must be made smaller by what counts as alike to reach the least."""
    return math.floor(math.log(value / least) / math.log1p(alike) + 1e-9)


def _changes(found: Found) -> int:
    """How many things differ from a plain step: settings of the optimizer, state dtype, checkpointing, fused loss."""
    manner = found.manner
    changed = (manner.checkpointing != "none", manner.fused_loss != "none", found.bound.member.state_dtype is not None)
    return sum(changed) + len(found.bound.candidate.settings)
