"""The Markdown for a record, whatever it is of."""

from __future__ import annotations

from optplan.planner.errors import ConfigError
from optplan.planner.measured.comparison import tabulate
from optplan.planner.measured.expectation import hold_against_rules
from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.record_files import Record
from optplan.planner.measured.sides import side_of_measurement
from optplan.reports.markdown.comparison import comparison_markdown
from optplan.reports.markdown.estimate import estimate_markdown


def record_markdown(record: Record) -> str:
    """An estimate, or a measured or traced step beside what the rules say of it."""
    if not isinstance(record, Measurement):
        return estimate_markdown(record)
    try:
        return comparison_markdown(hold_against_rules(record))
    except ConfigError:
        return comparison_markdown(tabulate([side_of_measurement(record, label="measured")]))
