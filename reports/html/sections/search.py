"""Sections of a search: the configuration to run, the trade-offs, what became of every other choice."""

from __future__ import annotations

from optplan.planner.search.records import Configuration, SearchReport
from optplan.planner.trainers.recommended import export_recommendation
from optplan.planner.units import format_gib
from optplan.reports.gpu_words import gpus_in_words, per_gpu
from optplan.reports.html.figures.trade_off import Point, name_of, trade_off
from optplan.reports.html.parts import (
    Code,
    Column,
    Download,
    Drawing,
    Fact,
    Facts,
    Kind,
    Part,
    Points,
    Section,
    Table,
    Value,
)
from optplan.reports.html.sections.exports import exports
from optplan.reports.html.text import sentence


def fit(report: SearchReport) -> Section:
    """The numbers of the recommendation, or what would make something fit."""
    found = report.recommendation
    if found is None:
        return Section("fit", "Does it fit?", "Nothing of the space searched fits.", _what_would_fit(report))
    time, each = found.time, per_gpu(found.config)
    tone = "good" if found.verdict == "fits" else "bad"
    basis = "simulated, rules" if found.is_simulated else "sum of rounded requests, rules"
    facts = [
        Fact(f"peak allocated{each}", found.peak_allocated_bytes, basis),
        Fact(f"margin{each}", found.margin_bytes, "limit less peak", tone=tone),
        Fact(f"peak reserved{each}", found.peak_reserved_bytes, "allocator simulated"),
        Fact(f"limit{each}", report.limit_bytes, "usable or budget, less reserve"),
        Fact(
            "time of a step", time.step_seconds if time else None, time.basis if time else "no time model", "duration"
        ),
        Fact("tokens a second", time.tokens_per_second if time else None, "all GPUs", "int"),
    ]
    text = f"{name_of(found)}; {found.tokens_per_step:,} tokens a step on {gpus_in_words(found.config)}."
    return Section("fit", "Does it fit?", text, [Facts(facts)])


def run(report: SearchReport, *, model: str) -> Section:
    """The recommendation's settings and its commands, the runner-up, and the files of training programs."""
    found = report.recommendation
    parts: list[Part] = []
    if found is not None:
        parts += [_settings(report, found), Code("command", "Command that prints its memory", found.command)]
    if report.runner_up is not None:
        parts.append(Code("runner-up", f"Runner-up: {name_of(report.runner_up)}", report.runner_up.command))
    parts.append(Download("optplan-recommend.json"))
    if found is not None:
        parts.append(exports(lambda target: export_recommendation(report, target, model=model)))
    return Section("run", "What should I run?", sentence(f"Picked by {report.rule}"), parts)


def why(report: SearchReport) -> Section:
    """The reasons, memory against time, and what became of every optimizer."""
    parts: list[Part] = [Points([*report.reasons, *report.advice])] if report.reasons or report.advice else []
    points = _points(report)
    if any(found.time for found, _ in points):
        parts.append(
            Drawing(
                id="trade-off",
                title="Peak memory against time",
                summary=f"{len(report.front)} configurations are beaten by no other in memory, time and evidence.",
                figure=trade_off(report, points),
                table=_trade_offs(points, report),
            )
        )
    parts.append(_alternatives(report))
    return Section("why", "Why?", "", parts)


def certainty(report: SearchReport) -> Section:
    """What the figures rest on, and how the space was decided."""
    decided, found = report.decided, report.recommendation
    sentences = [
        f"{decided.declared:,} configurations were decided: {decided.cannot_run:,} cannot run, "
        f"{decided.larger_batch + decided.resident + decided.memory:,} do not fit, {decided.beaten:,} are beaten, "
        f"{decided.front:,} were on the front.",
        "Memory is bytes per GPU of a steady step; “fits” leaves the room that the validated error asks for.",
    ]
    if found is not None:
        sentences.append(f"What is known of its quality: {found.evidence.class_title}.")
    if found is not None and found.time is not None:
        bound = {"gpu": "GPU", "host": "host", "link": "links between GPUs"}[found.time.bound]
        sentences.append(
            f"Times are {found.time.basis}; the optimizer's own part is {found.time.optimizer_basis}; the step is"
            f" bound by the {bound}."
        )
    parts: list[Part] = [Points([*sentences, *report.notes])]
    if found is not None:
        parts.append(_evidence(found))
    return Section("certainty", "How sure are we?", "", parts)


def _evidence(found: Configuration) -> Table:
    return Table(
        id="evidence",
        caption="What is known of each part of it",
        columns=[Column("Part"), Column("Class"), Column("Why"), Column("Source", "code")],
        rows=[[part.part, part.class_title, part.reason, part.source] for part in found.evidence.parts],
        source="table of evidence, each row with its own source",
    )


def _settings(report: SearchReport, found: Configuration) -> Table:
    config = found.config
    options: list[list[Value]] = [[f"option {name}", str(value)] for name, value in found.options.items()]
    rows: list[list[Value]] = [
        ["model", report.model.name],
        ["GPU", f"{config.gpus} × {report.gpu.name}"],
        ["optimizer", f"{found.optimizer}, implementation {found.implementation}"],
        *options,
        ["precision", config.precision],
        ["micro-batch", f"{config.batch_size} × {config.seq_len} tokens"],
        ["accumulated micro-batches", str(config.grad_accum)],
        ["checkpointing", config.checkpointing],
        ["loss", config.fused_loss],
        ["step in backward", "yes" if config.step_in_backward else "no"],
        ["sharding", config.sharding],
    ]
    return Table(
        id="configuration",
        caption="Configuration",
        columns=[Column("Setting"), Column("Value")],
        rows=rows,
        source=f"search, optplan {report.version}",
    )


def _points(report: SearchReport) -> list[Point]:
    """The front and the best of every choice that has one."""
    points: list[Point] = [(found, "on the front") for found in report.front]
    seen = {name_of(found) for found, _ in points}
    for choice in report.alternatives:
        if choice.best is not None and name_of(choice.best) not in seen:
            seen.add(name_of(choice.best))
            points.append((choice.best, choice.reason))
    return points


def _trade_offs(points: list[Point], report: SearchReport) -> Table:
    kinds: list[tuple[str, Kind]] = [
        ("Configuration", "text"), ("Peak allocated", "bytes"), ("Margin", "bytes"), ("Step, ms", "milliseconds"),
        ("Tokens a second", "int"), ("Why not", "text"),
    ]  # fmt: skip
    rows: list[list[Value]] = [
        [name_of(found), found.peak_allocated_bytes, found.margin_bytes,
         found.time.step_seconds if found.time else None, found.time.tokens_per_second if found.time else None,
         "recommended" if found == report.recommendation else reason]
        for found, reason in points
    ]  # fmt: skip
    return Table(
        id="trade-off-data",
        caption="Configurations on the front, and the best of each that is not",
        columns=[Column(title, kind) for title, kind in kinds],
        rows=rows,
        source=f"memory: rules; times: analytic model, {_basis(report)}; optplan {report.version}",
    )


def _basis(report: SearchReport) -> str:
    found = report.recommendation or next(iter(report.front), None)
    return found.time.basis if found is not None and found.time is not None else "none"


def _alternatives(report: SearchReport) -> Table:
    rows: list[list[Value]] = [
        [choice.optimizer, choice.implementation,
         ", ".join(f"{key}={value}" for key, value in choice.settings.items()) or None, choice.precision,
         choice.outcome, choice.reason]
        for choice in report.alternatives
    ]  # fmt: skip
    return Table(
        id="alternatives",
        caption="What became of every choice",
        columns=[Column("Optimizer"), Column("Implementation"), Column("Settings", "code"), Column("Precision"),
                 Column("Outcome"), Column("Reason")],
        rows=rows,
        tones=["bad" if choice.outcome in ("does not fit", "cannot run") else "" for choice in report.alternatives],
        source=f"search, optplan {report.version}",
    )  # fmt: skip


def _what_would_fit(report: SearchReport) -> list[Part]:
    if not report.what_would_fit:
        return []
    return [
        Table(
            id="what-would-fit",
            caption=f"The cheapest change in each direction; the limit is {format_gib(report.limit_bytes)}",
            columns=[Column("Change"), Column("Then"), Column("Command", "code")],
            rows=[[change.text, change.configuration, change.command] for change in report.what_would_fit],
            source=f"search, optplan {report.version}",
        )
    ]
