"""The comparison page: estimates, traces and measurements of a step over each other."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from optplan.planner.errors import ConfigError
from optplan.planner.expected_step import expected_side
from optplan.planner.measured.comparison import Comparison, compare, tabulate
from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.sides import Side, side_of_measurement
from optplan.planner.units import format_bytes, format_gib
from optplan.reports.html.page import render
from optplan.reports.html.parts import Page
from optplan.reports.html.sections.compared import bytes_apart, environments, errors, timelines, times
from optplan.reports.html.text import percent

_SMALL = 0.0005
"""A smaller share is told in bytes."""


def comparison_page(sides: Sequence[Side]) -> str:
    """Records beside each other as one HTML document.

    Raises:
        ConfigError: There are fewer than two.
    """
    return _page(compare(sides), sides)


def measurement_page(record: Measurement) -> str:
    """A measured or traced step over what today's rules say of it, or alone where they say nothing."""
    measured = side_of_measurement(record, label="measured" if record.source == "live" else "traced")
    try:
        sides = [measured, expected_side(record)]
    except ConfigError as error:
        table = tabulate([measured])
        return _page(msgspec.structs.replace(table, notes=[*table.notes, str(error)]), [measured])
    return _page(compare(sides), sides)


def _page(record: Comparison, sides: Sequence[Side]) -> str:
    base = sides[record.reference]
    sections = [
        errors(record), timelines(record, sides), bytes_apart(record), times(record), environments(record),
    ]  # fmt: skip
    config = base.config
    return render(
        Page(
            title=f"{base.model} with {base.optimizer} · optplan",
            kicker=f"{base.optimizer} ({base.implementation}) · {config.precision} · micro-batch {config.batch_size} ×"
            f" {config.seq_len} tokens · checkpointing {config.checkpointing} · {config.attention} attention",
            headline=_headline(record, sides),
            tone="",
            lead=_lead(sides),
            sections=[section for section in sections if section is not None],
            records={"comparison": record},
        )
    )


def _headline(record: Comparison, sides: Sequence[Side]) -> str:
    base = sides[record.reference]
    others = [side for side in sides if side is not base]
    if base.peak_allocated_bytes is None or not others:
        return f"{base.model}: one record"
    apart = max(
        (abs(side.peak_allocated_bytes - base.peak_allocated_bytes) for side in others if side.peak_allocated_bytes),
        default=None,
    )
    if apart is None:
        return f"{base.model}: no peaks to compare"
    if apart == 0:
        return f"{base.model}: the peaks are equal to the byte"
    fraction = apart / base.peak_allocated_bytes
    by = percent(fraction) if fraction >= _SMALL else format_bytes(apart)
    return f"{base.model}: the peaks are {by} apart"


def _lead(sides: Sequence[Side]) -> str:
    named = [f"{side.label} {format_gib(side.peak_allocated_bytes, digits=3)}" for side in sides
             if side.peak_allocated_bytes is not None]  # fmt: skip
    return f"Peak allocated: {', '.join(named)}." if named else ""
