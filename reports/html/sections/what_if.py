"""What if: switches over a grid of exact answers."""

from __future__ import annotations

from optplan.planner.records import EstimateReport
from optplan.planner.what_if import WhatIf
from optplan.reports.gpu_words import per_gpu
from optplan.reports.html.figures.memory import switch_bar
from optplan.reports.html.parts import Column, Section, Switches, Table

LABELS = {
    "optimizer": "Optimizer",
    "batch_size": "Micro-batch",
    "seq_len": "Tokens in a sequence",
    "checkpointing": "Checkpointing",
    "gpu": "GPU",
}
_LEAD = (
    "Every combination was worked out by the planner when this page was written; the page looks it up and calculates"
    " nothing."
)
_FITS = {True: "yes", False: "no", None: "by bytes"}


def what_if(report: EstimateReport, grid: WhatIf) -> Section:
    """The section."""
    each = per_gpu(report.config)
    source = f"rules, one simulated step each, optplan {report.version}"
    most = max(max(cell.usable_bytes, cell.peak_allocated_bytes) for cell in grid.cells)
    table = Table(
        id="what-if-data",
        caption=f"All answers of the switches{each and f', bytes{each}'}",
        columns=[
            *(Column(label, "text" if name in ("optimizer", "checkpointing", "gpu") else "int")
              for name, label in LABELS.items()),
            Column("Peak allocated", "bytes"),
            Column("Peak in"),
            Column("Peak reserved", "bytes"),
            Column("Headroom", "bytes"),
            Column("Fits"),
        ],
        rows=[
            [*(getattr(cell, name) for name in LABELS), cell.peak_allocated_bytes, cell.peak_phase,
             cell.peak_reserved_bytes, cell.headroom_bytes, _FITS[cell.fits]]
            for cell in grid.cells
        ],
        tones=["bad" if cell.fits is False else "" for cell in grid.cells],
        source=source,
    )  # fmt: skip
    switches = Switches(
        axes=[(name, label, [str(value) for value in grid.axes[name]]) for name, label in LABELS.items()],
        start={name: str(value) for name, value in grid.start.items()},
        figure=switch_bar(most_bytes=most),
        table=table,
        source=source,
    )
    lead = f"{_LEAD} Memory is that of each of {report.config.gpus} GPUs." if each else _LEAD
    return Section("what-if", "What if?", lead, [switches])
