"""A sweep as CSV: one line a row, units in the column names."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import msgspec

from optplan.planner.sweep_records import SweepReport, SweepRow

COLUMNS = SweepRow.__struct_fields__
"""The columns in order; what is not known is empty, options are `key=value` separated by semicolons."""


def sweep_csv(report: SweepReport) -> str:
    """The whole sweep with a line of column names first."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([_cell(value) for value in msgspec.to_builtins(row).values()] for row in report.rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return ";".join(f"{key}={_plain(option)}" for key, option in value.items())
    return "" if value is None else value


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
