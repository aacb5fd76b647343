"""Sections of the accuracy page: predicted against measured, and the errors by what they may depend on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from optplan.planner.accuracy import AccuracyReport, AccuracyRow, relative_error
from optplan.reports.html.figures.accuracy import BAND, agreement, error_boxes, residuals
from optplan.reports.html.parts import Column, Drawing, Fact, Facts, Section, Table, Value
from optplan.reports.html.text import percent


def totals(report: AccuracyReport) -> Section:
    """The figures in a few numbers."""
    errors = [row.peak_error for row in report.rows if row.peak_error is not None]
    reserved = [row.reserved_error for row in report.rows if row.reserved_error is not None]
    facts = [
        Fact("steps predicted", len(errors), f"of {len(report.rows)} measured", "int"),
        Fact("state equal to the byte", sum(row.state_is_exact for row in report.rows), "steps, records", "int"),
        Fact("median error", median(map(abs, errors)), "peak allocated", "error"),
        Fact("largest error", max(map(abs, errors)), "peak allocated", "error"),
        Fact("median error", median(map(abs, reserved)), "peak reserved", "error"),
        Fact("largest error", max(map(abs, reserved)), "peak reserved", "error"),
    ]
    text = f"Steady training steps on {report.place}, every one committed with the code, beside today's estimate."
    return Section("totals", "How far off?", text, [Facts(facts)])


def measured(report: AccuracyReport) -> Section:
    """Every step: predicted against measured."""
    rows = [row for row in report.rows if row.predicted_peak_bytes is not None]
    errors = [abs(row.peak_error or 0) for row in rows]
    drawing = Drawing(
        id="scatter",
        title="Peak allocated, predicted against measured",
        summary=f"{sum(error <= BAND for error in errors)} of {len(rows)} steps lie within 1 %; axes are logarithmic.",
        figure=agreement(rows),
        table=_steps(report),
    )
    return Section("steps", "Every measured step", "", [drawing, _residuals(rows)])


def _residuals(rows: Sequence[AccuracyRow]) -> Drawing:
    ordered = sorted(rows, key=lambda row: -abs(row.peak_error or 0))
    worst = ordered[0]
    table = Table(
        id="residuals-data",
        caption="Steps by the size of their error",
        columns=[Column("Model"), Column("Setting"), Column("Measured", "bytes"), Column("Error", "signed_percent")],
        rows=[[row.model, row.setting, row.measured_peak_bytes, row.peak_error] for row in ordered],
        source="rules against the measurement records of tests/records",
    )
    return Drawing(
        id="residuals",
        title="Error of each step",
        summary=f"The largest is {percent(worst.peak_error or 0, signed=True)}: {worst.model}, {worst.setting}.",
        figure=residuals(rows),
        table=table,
    )


def groups(report: AccuracyReport) -> Section:
    """Errors by model, optimizer and phase, and those of reserved memory."""
    rows = [row for row in report.rows if row.peak_error is not None]
    parts = [
        _grouped(rows, "model", "Error by model", lambda row: row.model),
        _grouped(rows, "optimizer", "Error by optimizer", lambda row: f"{row.optimizer} ({row.implementation})"),
        _grouped(rows, "setting", "Error by precision and checkpointing",
                 lambda row: f"{row.precision}, checkpointing {row.checkpointing}"),
        _phases(rows),
    ]  # fmt: skip
    return Section("groups", "Where are the errors?", "Each point is a measured step; the band is 1 %.", [*parts])


def _grouped(rows: Sequence[AccuracyRow], id_: str, title: str, key: Callable[[AccuracyRow], str]) -> Drawing:
    grouped: dict[str, list[float]] = {}
    for row in rows:
        grouped.setdefault(key(row), []).append(row.peak_error or 0.0)
    return _boxes(grouped, id_, title, "peak allocated")


def _phases(rows: Sequence[AccuracyRow]) -> Drawing:
    grouped: dict[str, list[float]] = {}
    for row in rows:
        for phase, size in row.predicted_phases.items():
            error = relative_error(size, row.measured_phases.get(phase, 0))
            if error is not None:
                grouped.setdefault(phase, []).append(error)
        if row.reserved_error is not None:
            grouped.setdefault("reserved", []).append(row.reserved_error)
    return _boxes(grouped, "phase", "Error by phase, and of reserved memory", "peak of a phase")


def _boxes(grouped: dict[str, list[float]], id_: str, title: str, what: str) -> Drawing:
    grouped = dict(sorted(grouped.items(), key=lambda item: -max(map(abs, item[1]))))
    worst = next(iter(grouped))
    table = Table(
        id=f"error-{id_}-data",
        caption=title,
        columns=[Column(id_.capitalize()), Column("Steps", "int"), Column("Median of |error|", "error"),
                 Column("Lowest", "signed_percent"), Column("Highest", "signed_percent")],
        rows=[[name, len(errors), median(map(abs, errors)), min(errors), max(errors)]
              for name, errors in grouped.items()],
        source="rules against the measurement records of tests/records",
    )  # fmt: skip
    return Drawing(
        id=f"error-{id_}",
        title=title,
        summary=f"The largest error is {percent(max(grouped[worst], key=abs), signed=True)}, for {worst}.",
        figure=error_boxes(grouped, what=what),
        table=table,
    )


def _steps(report: AccuracyReport) -> Table:
    titles = ["Precision", "Optimizer", "Checkpointing", "Attention", "More"]
    columns = [
        Column("Model"), *(Column(title) for title in titles), Column("Micro-batch", "int"), Column("Tokens", "int"),
        Column("Accumulated", "int"), Column("Measured", "bytes"), Column("Predicted", "bytes"),
        Column("Error", "signed_percent"), Column("Measured reserved", "bytes"), Column("Predicted reserved", "bytes"),
        Column("Error, reserved", "signed_percent"), Column("State exact"), Column("Record", "code"),
    ]  # fmt: skip
    return Table(
        id="steps-data",
        caption="Every measured step, per GPU",
        columns=columns,
        rows=[_cells(row) for row in report.rows],
        source=f"records named in the last column; predictions: rules, optplan {report.version}",
    )


def _cells(row: AccuracyRow) -> list[Value]:
    return [
        row.model, row.precision, f"{row.optimizer} ({row.implementation})", row.checkpointing, row.attention, row.more,
        row.batch_size, row.seq_len, row.grad_accum, row.measured_peak_bytes, row.predicted_peak_bytes, row.peak_error,
        row.measured_reserved_bytes, row.predicted_reserved_bytes, row.reserved_error,
        "yes" if row.state_is_exact else "no", row.record,
    ]  # fmt: skip
