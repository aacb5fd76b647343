"""The recommendation and its runner-up: the rule's order, each simulated until one fits with room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from optplan.planner.search.describe import Describer
from optplan.planner.search.explore import Found
from optplan.planner.search.picks import Ranked, in_order

_MOST_TRIES = 40
_MOST_CONFIRMED = 5
"""Of those that leave too little room, how many are simulated within the limit by the rule's order; then as many of the
others by their peak."""
_WHOLE = ("none", "ddp", "ddp-copies")
"""Ways of working on several GPUs in which each holds the whole model and its state."""
_DEEPSPEED = ("zero1-deepspeed", "zero2", "zero3")
"""Ways that take another training engine besides."""


class Choice(NamedTuple):
    """What was picked.

    Attributes:
        best: The one to run, None if nothing fits.
        runner_up: The next by the same rule with another optimizer or other number formats.
        passed_over: Those before it that fit by their peak and leave too little room; if it does so too, those before
            it that fragmentation refuses.
    """

    best: Found | None
    runner_up: Found | None
    passed_over: list[Found]


def choose(describer: Describer, found: Sequence[Found], prefer: str) -> Choice:
    """Pick by the rule of a preference; one without room is taken only if none has room, and if it runs as it is."""
    ordered, tight = in_order([(_ranked(one), one) for one in found], prefer), list[Found]()
    for place, candidate in enumerate(ordered[:_MOST_TRIES]):
        if any(_is_alike(candidate, other) for other in tight):
            continue
        verdict = describer.simulate(candidate)
        if verdict == "fits":
            return Choice(candidate, _runner_up(describer, ordered[place + 1 :], candidate), tight)
        if verdict == "tight":
            tight.append(candidate)
    return _of_tight(describer, tight)


def _of_tight(describer: Describer, tight: Sequence[Found]) -> Choice:
    """The first two that run, of those that leave too little room."""
    by_peak = sorted(tight[_MOST_CONFIRMED:], key=lambda one: one.peak_bytes)
    running, refused = list[Found](), list[Found]()
    for one in [*tight[:_MOST_CONFIRMED], *by_peak[:_MOST_CONFIRMED]]:
        if describer.comes_through(one):
            running.append(one)
        elif not running:
            refused.append(one)
        if len(running) == 2:
            break
    return Choice(running[0] if running else None, running[1] if len(running) > 1 else None, refused)


def _is_alike(found: Found, tight: Found) -> bool:
    """Whether another implementation of what proved tight, run alike and no smaller: that will be tight, too."""
    same_place = (found.bound.frame, found.manner, found.micro_batch) == (
        tight.bound.frame,
        tight.manner,
        tight.micro_batch,
    )
    same_optimizer = found.bound.candidate.id == tight.bound.candidate.id
    return same_place and same_optimizer and found.peak_bytes >= tight.peak_bytes


def _runner_up(describer: Describer, ordered: Sequence[Found], best: Found) -> Found | None:
    others = [other for other in ordered if _name_of(other) != _name_of(best)]
    return next((other for other in others[:_MOST_TRIES] if describer.simulate(other) == "fits"), None)


def _name_of(found: Found) -> tuple[str, str]:
    """What a runner-up must differ in."""
    return found.bound.candidate.id, found.bound.precision


def _ranked(found: Found) -> Ranked:
    manner, member = found.manner, found.bound.member
    sharding = found.bound.frame.layout.sharding
    changed = (manner.checkpointing != "none", manner.fused_loss != "none", member.state_dtype is not None)
    divided = (sharding not in _WHOLE, sharding in _DEEPSPEED)
    num_changes = sum(changed) + sum(divided) + len(found.bound.candidate.settings)
    return Ranked(found.key, found.seconds, found.peak_bytes, num_changes)
