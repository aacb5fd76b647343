"""Records in notebooks: tables and bars in the place of their fields."""

from __future__ import annotations

import sys
from typing import Any


def show_in_notebooks() -> None:
    """Let a running notebook show records as HTML; does nothing outside of one."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None else None
    if shell is not None:
        register(shell)


def register(shell: Any) -> None:
    """Tell IPython how to show records; their modules are loaded when one is shown."""
    formatter = shell.display_formatter.formatters["text/html"]
    formatter.for_type_by_name("optplan.planner.records", "EstimateReport", _estimate)
    formatter.for_type_by_name("optplan.planner.measured.measurement", "Measurement", _measurement)
    formatter.for_type_by_name("optplan.planner.measured.comparison", "Comparison", _comparison)
    formatter.for_type_by_name("optplan.planner.search.records", "SearchReport", _search)


def _estimate(record: Any) -> str:
    from optplan.reports.html.fragment import estimate_fragment

    return estimate_fragment(record)


def _measurement(record: Any) -> str:
    from optplan.reports.html.fragment import measurement_fragment

    return measurement_fragment(record)


def _comparison(record: Any) -> str:
    from optplan.reports.html.fragment import comparison_fragment

    return comparison_fragment(record)


def _search(record: Any) -> str:
    from optplan.reports.html.fragment import search_fragment

    return search_fragment(record)
