"""The accuracy page: predictions held against the measurements."""

from __future__ import annotations

from optplan.planner.accuracy import AccuracyReport
from optplan.reports.html.figures.accuracy import BAND
from optplan.reports.html.page import render
from optplan.reports.html.parts import Page, Points, Section
from optplan.reports.html.sections.accuracy import groups, measured, totals
from optplan.reports.html.sections.rivals import rivals
from optplan.reports.html.text import percent


def accuracy_page(report: AccuracyReport) -> str:
    """Predicted against measured as one HTML document."""
    errors = [abs(row.peak_error) for row in report.rows if row.peak_error is not None]
    return render(
        Page(
            title="Accuracy · optplan",
            kicker=f"{len(report.rows)} training steps measured on {report.place}",
            headline=f"{sum(error <= BAND for error in errors)} of {len(errors)} peaks are predicted within 1 %",
            tone="",
            lead=f"{errors.count(0.0)} are equal to the byte; the largest error is {percent(max(errors))}.",
            sections=[totals(report), measured(report), groups(report), *_others(report), _about(report)],
            records={"accuracy": report},
        )
    )


def _others(report: AccuracyReport) -> list[Section]:
    return [rivals(report.rivals)] if report.rivals else []


def _about(report: AccuracyReport) -> Section:
    sentences = [
        "Measured: peak allocated and reserved bytes of a steady step, as torch's allocator counts them.",
        "Predicted: the step rules and a simulation of torch's allocator, from the model's configuration alone; nothing"
        " is fitted to these records.",
        "Error: predicted over measured, less one. Where cached blocks of one size tie, the addresses that the driver"
        " chose decide how much is reserved, which nobody can know beforehand.",
        "Families without step rules have no predicted peak and no error.",
    ]  # fmt: skip
    return Section("about", "What was compared?", f"optplan {report.version}.", [Points(sentences)])
