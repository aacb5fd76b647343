"""The record of `optplan explain`: one configuration part by part, every number with its formula and its source."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from optplan.planner.records import GpuRow, ModelRow, StepConfig


class ExplainedLine(msgspec.Struct, frozen=True):
    """One number: what it is, the formula with its values filled in, the bytes.

    Attributes:
        name: What is counted: a parameter pattern, a saved tensor, a part of the GPU's memory.
        count: How many alike there are.
        bytes_each: Bytes of one.
        bytes: All of them together.
        formula: How `bytes_each` follows, values filled in.
    """

    name: str
    count: int
    bytes_each: int
    bytes: int
    formula: str


class ExplainedPart(msgspec.Struct, frozen=True):
    """One part of the step's memory.

    Attributes:
        key: Category, or `gpu` and `verdict`.
        title: The part in words.
        bytes: Its total, unrounded where it is resident.
        source: Where the rule comes from: a paper, a package, a measurement, a data sheet.
        lines: What it consists of, largest first.
        remark: What a reader must know to use the number.
    """

    key: str
    title: str
    bytes: int
    source: str
    lines: list[ExplainedLine]
    remark: str = ""


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """One optimizer's estimate taken apart."""

    schema: Literal["optplan.explain/1"] = "optplan.explain/1"
    version: str
    engine: str
    model: ModelRow
    gpu: GpuRow
    config: StepConfig
    optimizer: str
    implementation: str
    options: dict[str, Any]
    parts: list[ExplainedPart]
    peak_allocated_bytes: int | None
    peak_phase: str | None
    fits: bool | None
    notes: list[str] = []


def explained_line(name: str, bytes_each: int, formula: str, *, count: int = 1) -> ExplainedLine:
    """A line with its total worked out."""
    return ExplainedLine(name, count, bytes_each, count * bytes_each, formula)
