"""The Markdown for a record, whatever it is of."""

from __future__ import annotations

from collections.abc import Sequence

from optplan.planner.errors import ConfigError
from optplan.planner.measured.comparison import compare, tabulate
from optplan.planner.measured.expectation import hold_against_rules
from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.record_files import Record, load_record
from optplan.planner.measured.sides import side_of_measurement, sides_of
from optplan.reports.markdown.comparison import comparison_markdown
from optplan.reports.markdown.estimate import estimate_markdown


def files_markdown(paths: Sequence[str]) -> str:
    """The Markdown of one record, or of several beside each other.

    Raises:
        ConfigError: A file cannot be read or is no record of a step.
    """
    if len(paths) == 1:
        return record_markdown(load_record(paths[0]))
    return comparison_markdown(compare(sides_of(list(paths))))


def record_markdown(record: Record) -> str:
    """An estimate, or a measured or traced step beside what the rules say of it."""
    if not isinstance(record, Measurement):
        return estimate_markdown(record)
    try:
        return comparison_markdown(hold_against_rules(record))
    except ConfigError:
        return comparison_markdown(tabulate([side_of_measurement(record, label="measured")]))
