"""An estimate as Markdown: verdict, recommendation, table."""

from __future__ import annotations

from optplan.planner.records import Estimate, EstimateReport
from optplan.planner.units import GIB, format_gib
from optplan.reports.gpu_words import gpus_in_words, per_copy
from optplan.reports.margin import lost_in_words
from optplan.reports.markdown.tables import code, escaped, table


def estimate_markdown(report: EstimateReport) -> str:
    """The whole answer; ends with a line break."""
    lines = [f"### {_verdict(report)}", "", _setting(report), ""]
    lines += _recommendation(report)
    titles = ["Optimizer", "State GiB", "Resident GiB", "Peak GiB", "Peak in", "Reserved GiB", "Headroom GiB", "Fits"]
    lines += [*table(titles, [_row(row) for row in report.estimates]), ""]
    lines += [f"- {escaped(note)}" for note in _notes(report)]
    return "\n".join(lines) + "\n"


def _verdict(report: EstimateReport) -> str:
    rows, fitting = report.estimates, [row for row in report.estimates if row.fits]
    model, gpu = escaped(report.model.name), escaped(report.gpu.name)
    if not rows:
        return f"{model}: no optimizer can run this step"
    if all(row.fits is None for row in rows):
        return f"{model} on {gpu}: the resident bytes fit, the peak is not predicted"
    if len(rows) == 1:
        row = rows[0]
        lost = lost_in_words(fits=row.fits, headroom_bytes=row.headroom_bytes)
        return f"{model} with {row.optimizer} {'fits' if fitting else 'does not fit'} on {gpu}{lost}"
    count = f"{len(fitting)} of {len(rows)}" if fitting else f"any of {len(rows)}"
    return f"{model} {'fits' if fitting else 'does not fit'} on {gpu} with {count} optimizers"


def _setting(report: EstimateReport) -> str:
    config = report.config
    return (
        f"{report.model.num_parameters:,} parameters, {config.precision}, micro-batch {config.batch_size} x"
        f" {config.seq_len} tokens{per_copy(config)}, checkpointing {config.checkpointing}, {config.attention}"
        f" attention; {gpus_in_words(config)}{'; each' if config.gpus > 1 else ''}:"
        f" {format_gib(report.gpu.usable_bytes)} usable of {format_gib(report.gpu.total_bytes)}"
    )


def _recommendation(report: EstimateReport) -> list[str]:
    advice = report.recommendation
    if advice is None:
        return []
    extra = "" if advice.config == report.config else f" with checkpointing {advice.config.checkpointing}"
    reasons = [f"- {escaped(reason)}" for reason in advice.reasons]
    return [f"**Recommended: {escaped(advice.optimizer)}{extra}**", "", *reasons, "", *code(advice.command), ""]


def _row(row: Estimate) -> list[str]:
    fits = {True: "yes", False: "no", None: "not known"}[row.fits]
    sizes = [row.bytes.optimizer_state, row.bytes.total, row.peak_allocated_bytes]
    more = [row.peak_reserved_bytes, row.headroom_bytes]
    return [escaped(row.optimizer), *map(_gib, sizes), row.peak_phase or "-", *map(_gib, more), fits]


def _gib(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / GIB:.2f}"


def _notes(report: EstimateReport) -> list[str]:
    notes = [f"GiB = 2^30 bytes, per GPU; optplan {report.version}, engine {report.engine}", *report.notes]
    notes += [f"{row.optimizer}: {note}" for row in report.estimates for note in row.notes]
    return notes + [f"left out: {skipped.reason}" for skipped in report.skipped]
