"""The step moment by moment: memory over its events, and what is alive at the peak."""

from __future__ import annotations

from optplan.planner.estimate_details import EstimateDetails
from optplan.planner.records import EstimateReport
from optplan.planner.units import format_gib
from optplan.reports.gpu_words import per_gpu
from optplan.reports.html.figures.timeline import step_timeline
from optplan.reports.html.parts import Column, Drawing, Section, Table
from optplan.reports.labels import CATEGORY_NAMES


def step(report: EstimateReport, details: EstimateDetails) -> Section:
    """The section, for a family with step rules."""
    curve, row = details.curve, details.estimate
    assert curve is not None
    each = per_gpu(report.config)
    bytes_each = each and f", bytes{each}"
    source = f"{report.engine}, replayed through the simulated allocator, optplan {report.version}"
    table = Table(
        id="timeline-data",
        caption=f"Moments of the step{bytes_each}; of a long step the highest of each stretch of events",
        columns=[Column("After event", "int"), Column("Phase"), Column("What"), Column("Allocated", "bytes")],
        rows=[[point.event, point.phase, point.name, point.allocated_bytes] for point in curve.points],
        source=source,
    )
    alive = Table(
        id="alive",
        caption=f"Largest tensors alive at the peak{bytes_each}",
        columns=[Column("Tensor", "code"), Column("Category"), Column("Allocated", "bytes")],
        rows=[[tensor.name, CATEGORY_NAMES[tensor.category], tensor.bytes] for tensor in curve.alive],
        source=source,
    )
    drawing = Drawing(
        id="timeline",
        title=f"Allocated memory{each} over a steady step",
        summary=f"The peak, {format_gib(row.peak_allocated_bytes or 0)}, is reached in {row.peak_phase} after event "
        f"{curve.peak_event:,} of {curve.num_events:,}.",
        figure=step_timeline(
            curve.points, curve.phases, peak_event=curve.peak_event, usable_bytes=report.gpu.usable_bytes
        ),
        table=table,
    )
    lead = f"One steady step with {row.optimizer}: every allocation and free, in order."
    return Section("step", "When is the peak?", lead, [drawing, alive])
