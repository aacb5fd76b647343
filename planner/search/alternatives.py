"""What became of every choice: the constraint that excludes it, or what is better than its best configuration."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from optplan.planner.search.choose import Choice
from optplan.planner.search.describe import Describer, title_of
from optplan.planner.search.explore import Exploration, Found
from optplan.planner.search.picks import ALIKE_SECONDS, MOST_SLOWER
from optplan.planner.search.pool import BoundMember, Refused
from optplan.planner.search.records import Alternative, Outcome
from optplan.planner.units import format_gib


class Alternatives:
    """Tells of each optimizer, with its settings and under a precision, what became of it."""

    def __init__(self, exploration: Exploration, describer: Describer, choice: Choice, prefer: str) -> None:
        self._exploration = exploration
        self._describer = describer
        self._choice = choice
        self._prefer = prefer

    def every(self) -> list[Alternative]:
        """One for every optimizer with its settings under every precision."""
        bound = self._exploration.pool.bound
        return [self._bound(member) for member in bound] + [_refused(row) for row in self._exploration.pool.refused]

    def by_optimizer(self) -> list[Alternative]:
        """One for every optimizer: the furthest that any of its settings and precisions got."""
        return [self._furthest(name) for name in dict.fromkeys(self._names())]

    def _names(self) -> Iterable[str]:
        return (member.optimizer.id for member in self._exploration.space.members)

    def _furthest(self, name: str) -> Alternative:
        bound = [member for member in self._exploration.pool.bound if member.candidate.id == name]
        found = [self._exploration.best[member] for member in bound if member in self._exploration.best]
        best = self._choice.best
        if best is not None and best.bound in bound:
            return self._found(best)
        if found:
            return self._found(min(found, key=self._furthest_key))
        if bound:
            return self._excluded(min(bound, key=lambda member: self._exploration.least_bytes.get(member, 2**62)))
        return _refused(next(row for row in self._exploration.pool.refused if row.member.optimizer.id == name))

    def _furthest_key(self, found: Found) -> tuple[object, ...]:
        """A usual step with room first, not much slower than what was picked; then by evidence and time."""
        best = self._choice.best
        slow = best is not None and found.seconds > MOST_SLOWER * best.seconds
        tight = self._describer.verdict(found) != "fits"
        return found.manner.step_in_backward, tight, slow, found.key, found.seconds

    def _bound(self, member: BoundMember) -> Alternative:
        best = self._choice.best
        if best is not None and best.bound is member:
            return self._found(best)
        found = self._exploration.best.get(member)
        return self._found(found) if found else self._excluded(member)

    def _found(self, found: Found) -> Alternative:
        outcome, reason, winner = self._outcome(found)
        if found.manner.step_in_backward:
            reason = self._usually(found) + reason
        return Alternative(
            optimizer=found.bound.candidate.id,
            implementation=found.bound.candidate.implementation,
            settings=found.bound.candidate.settings,
            state_dtype=found.bound.member.state_dtype,
            precision=found.bound.precision,
            gpus=found.bound.frame.layout.gpus,
            sharding=found.bound.frame.layout.sharding,
            outcome=outcome,
            reason=reason,
            best=self._describer.describe(found, simulate=False),
            beaten_by=self._describer.describe(winner, simulate=False) if winner else None,
        )

    def _outcome(self, found: Found) -> tuple[Outcome, str, Found | None]:
        best = self._choice.best
        if found == best:
            return "recommended", "picked by the rule", None
        beaten = self._exploration.beaten.get(found.bound)
        if beaten is not None and beaten.found == found:
            return "beaten", f"{self._title(beaten.by)} {_better(found, beaten.by)}", beaten.by
        if self._describer.verdict(found) != "fits":
            peak, limit = format_gib(found.peak_bytes), format_gib(self._limit(found.bound))
            return "tight", f"its peak of {peak} leaves too little of {limit}", None
        return "on the front", _why_not(found, best, self._prefer), None

    def _usually(self, found: Found) -> str:
        """What the same optimizer needs without its step in backward, where that does not fit."""
        least, limit = self._exploration.least_usual_bytes.get(found.bound, 0), self._limit(found.bound)
        return f"with a step of its own it needs at least {format_gib(least)}; " if least > limit else ""

    def _excluded(self, member: BoundMember) -> Alternative:
        least, limit = self._exploration.least_bytes.get(member), self._limit(member)
        words = f"needs at least {format_gib(least)}, of {format_gib(limit)}" if least else "cannot run this step"
        return Alternative(
            optimizer=member.candidate.id,
            implementation=member.candidate.implementation,
            settings=member.candidate.settings,
            state_dtype=member.member.state_dtype,
            precision=member.precision,
            gpus=member.frame.layout.gpus,
            sharding=member.frame.layout.sharding,
            outcome="does not fit" if least else "cannot run",
            reason=words,
        )

    def _limit(self, member: BoundMember) -> int:
        return self._exploration.limit_of(member.frame)

    def _title(self, found: Found) -> str:
        return title_of(self._describer.describe(found, simulate=False))


def _refused(row: Refused) -> Alternative:
    optimizer = row.member.optimizer
    return Alternative(
        optimizer=optimizer.id,
        implementation=optimizer.implementation,
        settings={},
        state_dtype=row.member.state_dtype,
        precision=row.precision,
        gpus=row.layout.gpus,
        sharding=row.layout.sharding,
        outcome="cannot run",
        reason=row.reason,
    )


def _better(found: Found, other: Found) -> str:
    """In what a configuration is better than another that it beats."""
    saved = found.peak_bytes - other.peak_bytes
    memory = f"needs {format_gib(saved)} less" if saved >= 2**20 else "needs no more memory"
    gained = 1 - other.seconds / found.seconds
    time = f"is {gained:.0%} quicker" if gained >= 0.005 else "is no slower"
    sure = "is surer" if other.key < found.key else "is as sure"
    return f"{memory}, {time} and {sure}"


def _why_not(found: Found, best: Found | None, prefer: str) -> str:
    if best is None:
        return "nothing was picked"
    ratio = found.seconds / best.seconds
    time = f"a step takes {ratio:.2f} times as long" if ratio > 1 + ALIKE_SECONDS else ""
    evidence = "its evidence is weaker" if found.key > best.key else ""
    memory = "it needs more memory" if found.peak_bytes > best.peak_bytes else ""
    first = {"speed": (time, evidence, memory), "quality": (evidence, time, memory), "memory": (memory, evidence, time)}
    words: Sequence[str] = [word for word in first[prefer] if word]
    if prefer == "quality" and found.key < best.key and ratio > 1:
        words = [f"surer, but {time or 'no quicker'}; beyond {MOST_SLOWER:g} times the quickest it is not taken"]
    return " and ".join(words) or "as good; another one changes less"
