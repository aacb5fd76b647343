"""A record as a small piece of HTML, without scripts: what a notebook shows for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optplan.planner.errors import ConfigError
from optplan.planner.measured.comparison import Comparison, tabulate
from optplan.planner.measured.expectation import hold_against_rules
from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.sides import side_of_measurement
from optplan.planner.records import Estimate, EstimateReport
from optplan.planner.search.describe import title_of
from optplan.planner.search.records import Configuration, SearchReport
from optplan.planner.timeline import Category
from optplan.planner.units import format_bytes, format_gib
from optplan.reports.html import theme
from optplan.reports.html.page import environment
from optplan.reports.html.sections.verdict import headline, lead
from optplan.reports.html.text import sentence, shown
from optplan.reports.labels import CATEGORY_NAMES, ROW_NAMES, SECTION_TITLES

_BAR_WIDTH = 360
"""Pixels of the longest bar."""

_MOST_ROWS = 12

Segment = tuple[str, str, int]


def estimate_fragment(report: EstimateReport) -> str:
    """The verdict, and a row an optimizer with what is alive at its peak as a bar."""
    most = max([report.gpu.usable_bytes, *(row.peak_allocated_bytes or 0 for row in report.estimates)])
    rows = [(row.optimizer, _cells(row), _segments(row.peak_categories or {}, most)) for row in report.estimates]
    return _render(
        headline=headline(report)[0],
        lead=lead(report),
        titles=["Optimizer", "State GiB", "Peak GiB", "Headroom GiB", "At the peak"],
        rows=rows,
        note=f"GiB = 2^30 bytes, per GPU; {format_gib(report.gpu.usable_bytes)} usable; engine {report.engine}, "
        f"optplan {report.version}",
    )


def search_fragment(report: SearchReport) -> str:
    """What to run, and a row for each of the best configurations."""
    found, most = report.recommendation, max([report.limit_bytes, *(row.peak_allocated_bytes for row in report.front)])
    verb = "does not fit" if found is None else found.verdict
    return _render(
        headline=f"{report.model.name} on {report.gpu.name}: {title_of(found) + ' ' if found else ''}{verb}",
        lead=sentence(report.reasons[0]) if report.reasons else "",
        titles=["Configuration", "Peak GiB", "Step", "Evidence", "Peak"],
        rows=[_searched(row, most) for row in report.front[:_MOST_ROWS]],
        note=f"{min(_MOST_ROWS, len(report.front))} of {len(report.front)} configurations that no other beats; picked"
        f" by {report.rule}; optplan {report.version}",
    )


def _searched(row: Configuration, most_bytes: int) -> tuple[str, list[str], list[Segment]]:
    peak = row.peak_allocated_bytes
    time = shown(row.time.step_seconds if row.time else None, "duration")
    bar = ("peak allocated", theme.CATEGORIES["parameters"][0], round(_BAR_WIDTH * peak / most_bytes))
    return title_of(row), [shown(peak, "bytes"), time, row.evidence.class_title], [bar]


def comparison_fragment(record: Comparison) -> str:
    """Every number of records beside each other."""
    return _render(
        headline=" and ".join(side.label for side in record.sides),
        lead="; ".join(record.notes),
        titles=["", *(side.label for side in record.sides), ""],
        rows=_compared(record),
        note=f"differences are from {record.sides[record.reference].label}",
    )


def measurement_fragment(record: Measurement) -> str:
    """Every number of the step beside what the rules say of it."""
    try:
        comparison = hold_against_rules(record)
    except ConfigError:
        comparison = tabulate([side_of_measurement(record, label="measured")])
    peak = record.peak_allocated_bytes
    return _render(
        headline=f"{record.model.name} with {record.optimizer} ({record.implementation})",
        lead="" if peak is None else f"Peak {format_gib(peak)} allocated, in {record.peak_phase}.",
        titles=["", *(side.label for side in comparison.sides), ""],
        rows=_compared(comparison),
        note=f"{record.environment.gpu or 'CPU'}, {record.environment.date}, optplan {record.version}",
    )


def _cells(row: Estimate) -> list[str]:
    return [shown(size, "bytes") for size in (row.bytes.optimizer_state, row.peak_allocated_bytes, row.headroom_bytes)]


def _segments(categories: Mapping[Category, int], most_bytes: int) -> list[Segment]:
    """Label, colour and width in pixels of each part of a bar."""
    return [
        (f"{CATEGORY_NAMES[name]}: {categories[name]:,} bytes", theme.CATEGORIES[name][0], width)
        for name in CATEGORY_NAMES
        if (width := round(_BAR_WIDTH * categories.get(name, 0) / most_bytes))
    ]


def _compared(record: Comparison) -> list[tuple[str, list[str], list[Segment]]]:
    rows: list[tuple[str, list[str], list[Segment]]] = []
    for section, title in SECTION_TITLES.items():
        for row in record.rows:
            if row.section == section and row.unit == "bytes":
                name = f"{title}: {ROW_NAMES.get(row.name, row.name)}"
                rows.append((name, ["-" if value is None else format_bytes(int(value)) for value in row.values], []))
    return rows


def _render(**parts: Any) -> str:
    return environment().get_template("fragment.html").render(font=theme.FONT, **parts)
