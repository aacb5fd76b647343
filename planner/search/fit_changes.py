"""What would make something fit: the cheapest change in each direction, each confirmed by asking again with it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from typing import Any

from optplan.planner.errors import ConfigError
from optplan.planner.gpus import Gpu, load_gpus
from optplan.planner.recommend import ROOM
from optplan.planner.search.describe import title_of
from optplan.planner.search.explore import Exploration
from optplan.planner.search.pool import BoundMember
from optplan.planner.search.question import Question, check_question
from optplan.planner.search.records import Configuration, FitChange
from optplan.planner.sharding.registry import FULL_SHARDINGS
from optplan.planner.units import format_gib

Answer = Callable[[Question], Configuration | None]

_SHORTEST = 128
_MOST_GPUS_TRIED = 4
_GPUS_TRIED = (2, 4, 8, 16, 32, 64)
_LEAST_BYTES = 2
"""Of a parameter, in any configuration."""
_DEFAULTS = (("gpus", "1"), ("gpus", 1), ("prefer", "quality"))
_NAMES = {"precision": "number formats", "checkpointing": "checkpointing", "batch_size": "the micro-batch"}


def fit_changes(question: Question, exploration: Exploration, answer: Answer) -> list[FitChange]:
    """The changes with which something fits, one a direction.

    Args:
        question: What was asked, and nothing fits.
        exploration: What was found.
        answer: Gives the recommendation for another question, None if nothing fits either.
    """
    found = [_more_gpus(question, exploration, answer), _released(question, answer), _larger_limit(question, answer)]
    if any(member.resident_bytes <= exploration.limit_of(member.frame) for member in exploration.pool.bound):
        found.append(_shorter(question, answer))
    changes = [*_larger_gpu(question, exploration, answer), *(change for part in found for change in part)]
    return changes or list(_together(question, answer))


def _larger_gpu(question: Question, exploration: Exploration, answer: Answer) -> Iterator[FitChange]:
    needed = min(exploration.least_bytes.values(), default=None)
    if needed is None:
        return
    own = question.base.gpu
    larger = sorted(
        (gpu for gpu in load_gpus().values() if _is_larger(gpu, own, needed)),
        key=lambda gpu: (gpu.usable_bytes, gpu.id),
    )
    for gpu in larger[:_MOST_GPUS_TRIED]:
        changed = {key: value for key, value in question.asked.items() if key not in ("gpu", "memory", "budget")}
        text = f"a GPU of {format_gib(gpu.usable_bytes)} usable, such as {gpu.id}"
        change = _try(question, changed | {"gpu": gpu.id}, "gpu", text, answer)
        if change:
            yield change
            return


def _is_larger(gpu: Gpu, own: Gpu, needed: int) -> bool:
    """Whether a GPU of the same make has room for what is needed and more than the one at hand."""
    same_make = gpu.vendor == (own.vendor or "nvidia")
    return same_make and gpu.usable_bytes * (1 - ROOM) > needed and gpu.usable_bytes > own.usable_bytes


def _more_gpus(question: Question, exploration: Exploration, answer: Answer) -> Iterator[FitChange]:
    """The fewest of the same GPU, fully sharded."""
    most = max(question.space.micro_batches)
    whole = min((_whole_bytes(member) for member in exploration.pool.bound), default=0)
    for count in _GPUS_TRIED:
        # A share of what is resident that does not fit by itself needs no search.
        if count > most and whole <= count * question.limit_bytes:
            changed = question.asked | {"gpus": count, "sharding": "fsdp2"}
            text = f"{count} of {question.base.gpu.id} with --sharding fsdp2"
            change = _try(question, changed, "gpus", text, answer)
            if change:
                yield change
                return


def _whole_bytes(member: BoundMember) -> int:
    """Parameters, master weights and state over all ranks, at most."""
    layout = member.frame.layout
    return member.resident_bytes * (layout.gpus if layout.sharding in FULL_SHARDINGS else 1)


def _released(question: Question, answer: Answer) -> Iterator[FitChange]:
    for name, value in question.fixed.items():
        changed = {key: given for key, given in question.asked.items() if key != name}
        given_value = ", ".join(value) if isinstance(value, list) else value
        text = f"leave {_NAMES.get(name, name.replace('_', ' '))} free instead of {given_value}"
        change = _try(question, changed, name, text, answer, frees_optimizer=name == "optimizer")
        if change:
            yield change


def _together(question: Question, answer: Answer) -> Iterator[FitChange]:
    """Where no single change helps: several of the same GPU, and everything free that had been fixed."""
    free = {key: value for key, value in question.asked.items() if key not in question.fixed}
    names = " and ".join(_NAMES.get(name, name.replace("_", " ")) for name in question.fixed if name != "sharding")
    freed = f"; {names} left free" if names else ""
    least = _LEAST_BYTES * question.base.model.num_parameters
    for count in _GPUS_TRIED:
        if count > max(question.space.micro_batches) and least <= count * question.limit_bytes:
            text = f"{count} of {question.base.gpu.id} with --sharding fsdp2{freed}"
            changed = free | {"gpus": count, "sharding": "fsdp2"}
            change = _try(question, changed, "together", text, answer, frees_optimizer=True)
            if change:
                yield change
                return


def _larger_limit(question: Question, answer: Answer) -> Iterator[FitChange]:
    for name in ("budget", "reserve"):
        if name in question.asked:
            changed = {key: given for key, given in question.asked.items() if key != name}
            change = _try(question, changed, name, f"without --{name} {question.asked[name]}", answer)
            if change:
                yield change


def _shorter(question: Question, answer: Answer) -> Iterator[FitChange]:
    length = question.base.config.seq_len // 2
    while length >= _SHORTEST:
        changed = question.asked | {"seq_len": length}
        change = _try(question, changed, "seq_len", f"sequences of {length} tokens", answer)
        if change:
            yield change
            return
        length //= 2


def _try(
    question: Question,
    asked: dict[str, Any],
    direction: str,
    text: str,
    answer: Answer,
    *,
    frees_optimizer: bool = False,
) -> FitChange | None:
    names, settings = (None, None) if frees_optimizer else (question.optimizers, question.settings)
    try:
        other = check_question(question.model, optimizer=names, options=settings, **asked)
    except ConfigError:
        return None
    best = answer(other)
    return FitChange(direction, text, title_of(best), command_for(other)) if best else None


def command_for(question: Question) -> str:
    """The `optplan recommend` command that asks a question."""
    model = question.base.model
    words = ["optplan", "recommend", "--model", model.reference or model.name]
    for name in question.optimizers or ():
        words += ["--optimizer", name]
    for text in question.settings or ():
        words += ["--set", text]
    asked = {name: value for name, value in question.asked.items() if (name, value) not in _DEFAULTS}
    for name, value in asked.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words += [flag] if value else ["--no-step-in-backward"] if name == "step_in_backward" else []
        else:
            words += [flag, str(value)]
    return shlex.join(words)
