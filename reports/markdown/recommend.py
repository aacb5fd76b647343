"""A search as Markdown: what to run, what is next, why the others lost."""

from __future__ import annotations

from optplan.planner.search.describe import named, title_of
from optplan.planner.search.records import Configuration, SearchReport
from optplan.planner.units import GIB, format_gib
from optplan.reports.markdown.tables import code, escaped, table

_MOST_ON_FRONT = 12


def recommend_markdown(report: SearchReport) -> str:
    """The whole answer; ends with a line break."""
    lines = [f"### {_headline(report)}", "", _setting(report), "", *_best(report), *_changes(report)]
    if report.front:
        titles = ["Configuration", "Evidence", "Peak GiB", "Step s", "Tokens/s"]
        rows = [_row(found) for found in report.front[:_MOST_ON_FRONT]]
        lines += [
            f"**{len(rows)} of {len(report.front)} configurations that no other beats**", "",
            *table(titles, rows, num_texts=2), "",
        ]  # fmt: skip
    lines += ["**What became of each optimizer**", "", *_alternatives(report), ""]
    lines += [f"- {escaped(note)}" for note in [f"optplan {report.version}; picked by {report.rule}", *report.notes]]
    return "\n".join(lines) + "\n"


def _headline(report: SearchReport) -> str:
    model, gpu, best = escaped(report.model.name), escaped(report.gpu.name), report.recommendation
    if best is None:
        return f"{model} does not fit on {gpu} with anything that was searched"
    return f"{model} on {gpu}: {escaped(title_of(best))} {best.verdict}"


def _setting(report: SearchReport) -> str:
    return (
        f"{report.model.num_parameters:,} parameters, {report.sequences_per_step:,} x {report.seq_len:,} tokens a step,"
        f" {format_gib(report.limit_bytes)} to take, prefer {report.prefer}"
    )


def _best(report: SearchReport) -> list[str]:
    best, second = report.recommendation, report.runner_up
    if best is None:
        return []
    lines = [f"- {escaped(sentence)}" for sentence in [*report.reasons, *report.advice]]
    lines += ["", *code(best.command), ""]
    if second is not None:
        peak = format_gib(second.peak_allocated_bytes)
        lines += [f"Runner-up: {escaped(title_of(second))}, peak {peak}", ""]
    return lines


def _changes(report: SearchReport) -> list[str]:
    if report.recommendation is not None or not report.what_would_fit:
        return []
    rows = [[escaped(change.text), escaped(change.configuration)] for change in report.what_would_fit]
    return ["**What would make it fit, each change alone**", "", *table(["Change", "Then"], rows, num_texts=2), ""]


def _row(found: Configuration) -> list[str]:
    time = found.time
    times = [f"{time.step_seconds:.3g}", f"{time.tokens_per_second:,.0f}"] if time else ["-", "-"]
    peak = f"{found.peak_allocated_bytes / GIB:.2f}"
    return [escaped(title_of(found)), escaped(found.evidence.class_title), peak, *times]


def _alternatives(report: SearchReport) -> list[str]:
    rows = []
    for choice in report.alternatives:
        name = named(choice.optimizer, choice.settings, choice.state_dtype)
        tried = title_of(choice.best) if choice.best else f"{name}, {choice.precision}"
        rows.append([escaped(tried), choice.outcome, escaped(choice.reason)])
    return table(["Its best configuration", "Outcome", "Why"], rows, num_texts=3)
