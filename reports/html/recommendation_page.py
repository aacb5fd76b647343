"""The page of a search: what to run, memory against time, and the step of the configuration that was picked."""

from __future__ import annotations

from optplan.planner.errors import ConfigError
from optplan.planner.estimate_details import EstimateDetails, estimate_in_detail
from optplan.planner.records import EstimateReport, StepConfig
from optplan.planner.search.records import SearchReport
from optplan.planner.what_if import WORK
from optplan.reports.html.page import render
from optplan.reports.html.parts import Page, Section
from optplan.reports.html.sections.search import certainty, fit, run, why
from optplan.reports.html.sections.state import state
from optplan.reports.html.sections.step import step
from optplan.reports.html.sections.what_if import what_if
from optplan.reports.html.text import sentence

_WORK = WORK // 3
"""What the switches may take, the search having taken its time already."""


def recommendation_page(report: SearchReport, *, model: str | None = None) -> str:
    """A search as one HTML document.

    Args:
        report: What the search answered.
        model: What it was asked about, where the record's name is none of the catalogue's.
    """
    found = report.recommendation
    details = _details(report, model)
    tone = "good" if found is not None and found.verdict == "fits" else "bad"
    return render(
        Page(
            title=f"{report.model.name} on {report.gpu.name} · optplan",
            kicker=f"{report.model.num_parameters:,} parameters · {report.seq_len} tokens in a sequence · "
            f"{report.sequences_per_step} sequences a step · preferring {report.prefer}",
            headline=_headline(report),
            tone=tone,
            lead=sentence(report.reasons[0]) if report.reasons else "",
            sections=[
                fit(report),
                run(report, model=model or report.model.name),
                why(report),
                *_step_sections(details),
                certainty(report),
            ],
            records={"recommend": report, "what_if": details[1].what_if if details else None},
        )
    )


def _headline(report: SearchReport) -> str:
    found = report.recommendation
    if found is None:
        return f"{report.model.name} does not fit on {report.gpu.name}"
    count = f"{found.config.gpus} × " if found.config.gpus > 1 else ""
    return f"{report.model.name} on {count}{report.gpu.name}: run {found.optimizer}"


def _details(report: SearchReport, model: str | None) -> tuple[EstimateReport, EstimateDetails] | None:
    """The estimate of the configuration that was picked, and its details; None where it cannot be made again."""
    found = report.recommendation
    if found is None:
        return None
    settings = {name: getattr(found.config, name) for name in StepConfig.__struct_fields__}
    target = {"memory": report.gpu.total_bytes} if report.gpu.context_bytes == 0 else {"gpu": report.gpu.name}
    try:
        return estimate_in_detail(
            model or report.model.name,
            optimizer=found.optimizer,
            options={"implementation": found.implementation, **found.options},
            work=_WORK,
            state_dtype=found.state_dtype,
            **settings,
            **target,
        )
    except ConfigError:
        return None


def _step_sections(details: tuple[EstimateReport, EstimateDetails] | None) -> list[Section]:
    if details is None:
        return []
    estimated, found = details
    sections = [step(estimated, found)] if found.curve else []
    sections.append(state(estimated, found))
    return [*sections, what_if(estimated, found.what_if)] if found.what_if else sections
