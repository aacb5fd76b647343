"""How sure are we: what is exact, what the measurements say, and the source of every part."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import msgspec

from optplan.planner.accuracy import Evidence
from optplan.planner.explanation import ExplainedPart
from optplan.planner.records import Estimate, EstimateReport
from optplan.planner.units import format_gib
from optplan.reports.gpu_words import per_gpu
from optplan.reports.html.parts import Column, Part, Points, Section, Table
from optplan.reports.html.text import percent


@cache
def evidence() -> Evidence:
    """What the committed measurements say of the rules; written with the example pages."""
    text = files("optplan.reports.html").joinpath("evidence.json").read_bytes()
    return msgspec.json.decode(text, type=Evidence)


def certainty(report: EstimateReport, sources: list[ExplainedPart]) -> Section:
    """The section."""
    parts: list[Part] = [Points(_levels(report)), *([_sources(report, sources)] if sources else [])]
    notes = [*report.notes, *(f"{row.optimizer}: {note}" for row in report.estimates for note in _notes(row))]
    notes += [f"left out: {skipped.reason}" for skipped in report.skipped]
    if notes:
        parts.append(Points(notes))
    return Section("certainty", "How sure are we?", "", parts)


def _levels(report: EstimateReport) -> list[str]:
    found = evidence()
    sentences = [
        "Parameters, gradients, master weights and optimizer state are exact to the byte: "
        f"{found.num_exact} of {found.num_measured} steps measured on {found.place} have the predicted ones.",
    ]
    if report.engine == "rules":
        median, largest = percent(found.median_error, digits=3), percent(found.largest_error)
        reserved = percent(found.median_reserved_error, digits=3), percent(found.largest_reserved_error)
        sentences.append(
            f"Peaks come from rules and a simulated allocator: over {found.num_steps} measured steps the median error"
            f" of peak allocated is {median}, the largest {largest};"
            f" {percent(found.share_within_band, digits=0)} are within 1 %. Reserved: median {reserved[0]}, largest"
            f" {reserved[1]}."
        )
    else:
        sentences.append("Peaks come from the model itself, run without contents, and a simulated allocator.")
    sentences.append(
        "GiB = 2^30 bytes, per GPU. A peak is allocated bytes of a steady step, every one after the first. Reserved is"
        " what the allocator takes from the driver for it on an empty GPU; part of that is given back when memory runs"
        " out."
    )
    return sentences


def _sources(report: EstimateReport, parts: list[ExplainedPart]) -> Table:
    each = per_gpu(report.config)
    return Table(
        id="sources",
        caption=f"Where each number comes from{each and f'; bytes{each}'}",
        columns=[Column("Part"), Column("Size", "bytes"), Column("Largest term", "code"), Column("Source")],
        rows=[[part.title, part.bytes, part.lines[0].formula if part.lines else "", part.source] for part in parts],
        source=f"the formulas in full: optplan explain, version {report.version}",
    )


def _notes(row: Estimate) -> list[str]:
    if not row.state_variants:
        return row.notes
    numbers = ", ".join(f"{name} {format_gib(size)}" for name, size in row.state_variants.items())
    return [f"state: {numbers}, as estimated {format_gib(row.bytes.optimizer_state)}", *row.notes]
