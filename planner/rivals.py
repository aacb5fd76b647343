"""What public memory estimators say of training steps that were measured on a GPU.

Source: `data/rivals.toml`, which `benchmarks/run_rivals.py` writes by asking each of them.
"""

from __future__ import annotations

import datetime
import tomllib
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from statistics import median

import msgspec

from optplan.planner.errors import DataError
from optplan.planner.version import VERSION

_GPU = "h200-141g"


class RivalCase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A measured step: its settings as in an estimate, and the peak of its allocated bytes."""

    model: str
    precision: str
    optimizer: str
    implementation: str
    batch_size: int
    seq_len: int
    checkpointing: str
    attention: str
    measured_peak_bytes: int

    @property
    def setting(self) -> str:
        """Everything but the model in a few words."""
        return (
            f"{self.optimizer} ({self.implementation}), {self.precision}, {self.batch_size} x {self.seq_len},"
            f" checkpointing {self.checkpointing}, {self.attention}"
        )


class RivalAnswer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an estimator says of a case.

    Attributes:
        case: Number of the case, from 0.
        predicted_bytes: None where it cannot express the step.
        is_nearest: Whether it was asked for the nearest step that it can express, which is not the one measured.
        call: How it was asked.
        note: What of the step it does not take, or why it has no answer.
    """

    case: int
    predicted_bytes: int | None = None
    is_nearest: bool = False
    call: str
    note: str = ""


class RivalTool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An estimator and its answers.

    Attributes:
        title: Its name.
        package: What `pip install` takes.
        version: The version that was asked.
        source: Where it is documented.
        counts: What its figure is the sum of.
        answers: One for each case.
    """

    title: str
    package: str
    version: str
    source: str
    counts: str
    answers: list[RivalAnswer]


class Rivals(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The cases and all answers.

    Attributes:
        date: Day on which the estimators were asked.
        environment: With what.
        record: The record that holds the measurements.
        place: Where they were made.
    """

    date: datetime.date
    environment: str
    record: str
    place: str
    cases: list[RivalCase]
    tools: list[RivalTool]

    def errors(self, tool: RivalTool, *, with_nearest: bool = True) -> list[float]:
        """Predicted over measured peak, less one, of each case that the estimator answers."""
        return [
            answer.predicted_bytes / self.cases[answer.case].measured_peak_bytes - 1
            for answer in tool.answers
            if answer.predicted_bytes is not None and (with_nearest or not answer.is_nearest)
        ]


@cache
def load_rivals() -> Rivals:
    """The table.

    Raises:
        DataError: It is damaged, or an answer is of no case.
    """
    try:
        table = tomllib.loads(files("optplan.planner.data").joinpath("rivals.toml").read_text("utf-8"))
        found = msgspec.convert(table, Rivals)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise DataError(f"rivals.toml is damaged: {error}") from error
    for tool in found.tools:
        if [answer.case for answer in tool.answers] != list(range(len(found.cases))):
            raise DataError(f"rivals.toml does not hold one answer of {tool.title} for each case")
    return found


def compared_rivals() -> Rivals:
    """The table with today's estimates of the same steps as one more tool, the most exact tool first."""
    found = load_rivals()
    tools = sorted([_own(found.cases), *found.tools], key=lambda tool: median(map(abs, found.errors(tool))))
    return msgspec.structs.replace(found, tools=tools)


def _own(cases: Iterable[RivalCase]) -> RivalTool:
    return RivalTool(
        title="optplan",
        package="optplan",
        version=VERSION,
        source="docs/memory-model.md",
        counts="every allocation of the step by rules, in the blocks that torch's allocator deals out",
        answers=[_own_answer(number, case) for number, case in enumerate(cases)],
    )


def _own_answer(number: int, case: RivalCase) -> RivalAnswer:
    # Only a page of accuracy needs the planner's whole machinery.
    from optplan.planner.estimate import estimate

    (row,) = estimate(
        case.model,
        gpu=_GPU,
        optimizer=case.optimizer,
        options={"implementation": case.implementation},
        precision=case.precision,
        batch_size=case.batch_size,
        seq_len=case.seq_len,
        checkpointing=case.checkpointing,
        attention=case.attention,
    ).estimates
    call = f"optplan.estimate({case.model!r}, gpu={_GPU!r}, ...)"
    return RivalAnswer(case=number, predicted_bytes=row.peak_allocated_bytes, call=call)
