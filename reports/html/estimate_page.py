"""The recommendation page: does it fit, what to run, why, how sure."""

from __future__ import annotations

from optplan.planner.estimate_details import EstimateDetails
from optplan.planner.records import EstimateReport
from optplan.reports.gpu_words import gpus_in_words, per_copy
from optplan.reports.html.page import render
from optplan.reports.html.parts import Page, Section
from optplan.reports.html.sections.certainty import certainty, evidence
from optplan.reports.html.sections.run import run
from optplan.reports.html.sections.state import state
from optplan.reports.html.sections.step import step
from optplan.reports.html.sections.verdict import headline, lead, verdict
from optplan.reports.html.sections.what_if import what_if
from optplan.reports.html.sections.why import why


def estimate_page(report: EstimateReport, details: EstimateDetails | None = None) -> str:
    """An estimate as one HTML document.

    Args:
        report: The estimate.
        details: Its configuration in focus in detail; without them the page lacks timeline, state and switches.
    """
    title, tone = headline(report)
    return render(
        Page(
            title=f"{report.model.name} on {report.gpu.name} · optplan",
            kicker=_setting(report),
            headline=title,
            tone=tone,
            lead=lead(report),
            sections=_sections(report, details),
            records={
                "estimate": report,
                "what_if": details.what_if if details else None,
                "evidence": evidence(),
            },
        )
    )


def _sections(report: EstimateReport, details: EstimateDetails | None) -> list[Section]:
    sections = [verdict(report, details.estimate if details else None), run(report), why(report)]
    if details is not None:
        sections += [step(report, details)] if details.curve else []
        sections.append(state(report, details))
        sections += [what_if(report, details.what_if)] if details.what_if else []
    return [*sections, certainty(report, details.parts if details else [])]


def _setting(report: EstimateReport) -> str:
    config = report.config
    return " · ".join(
        [
            f"{report.model.num_parameters:,} parameters",
            config.precision,
            f"micro-batch {config.batch_size} × {config.seq_len} tokens{per_copy(config)}",
            *([f"{config.grad_accum} accumulated"] if config.grad_accum > 1 else []),
            f"checkpointing {config.checkpointing}",
            f"{config.attention} attention",
            *([config.alloc_conf] if config.alloc_conf else []),
            gpus_in_words(config) + ("; memory is that of each GPU" if config.gpus > 1 else ""),
        ]
    )
