"""Why an estimate recommends nothing, in the words that every renderer uses."""

from __future__ import annotations

from optplan.planner.recommend import ROOM
from optplan.planner.records import EstimateReport


def why_nothing(report: EstimateReport) -> str:
    """The reason, to be read after "recommended:"; of a report without a recommendation whose peaks are known."""
    # Of the other ways to checkpoint, full is tried in place of none alone.
    also_full = report.config.checkpointing == "none"
    if not any(row.fits for row in report.estimates):
        return "none of these has room" + (", not even with full checkpointing" if also_full else "")
    return f"none of these with a margin: what fits reserves more than {1 - ROOM:.0%} of the usable memory" + (
        ", and with full checkpointing too" if also_full else ""
    )
