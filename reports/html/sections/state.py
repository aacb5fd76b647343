"""The optimizer's state tensor by tensor."""

from __future__ import annotations

from optplan.planner.estimate_details import EstimateDetails
from optplan.planner.records import EstimateReport
from optplan.planner.units import format_gib
from optplan.reports.gpu_words import per_gpu
from optplan.reports.html.figures.state import state_treemap
from optplan.reports.html.parts import Column, Drawing, Section, Table


def state(report: EstimateReport, details: EstimateDetails) -> Section:
    """The section."""
    row = details.estimate
    total, each = row.bytes.optimizer_state, per_gpu(report.config)
    table = Table(
        id="state-data",
        caption=f"State tensors{each}; layers that are alike are one row",
        columns=[
            Column("Parameter", "code"),
            Column("State", "code"),
            Column("Shape", "code"),
            Column("Dtype", "code"),
            Column("On"),
            Column("Tensors", "int"),
            Column("Bytes each", "int"),
            Column("All", "bytes"),
        ],
        rows=[
            [item.parameter or "(kept once)", item.state, " × ".join(map(str, item.shape)) or "scalar", item.dtype,
             item.device, item.count, item.bytes_each, item.bytes]
            for item in details.state
        ],
        source=f"exact, from the optimizer's model over the inventory, optplan {report.version}",
    )  # fmt: skip
    by_name = ", ".join(f"{name} {format_gib(size)}" for name, size in row.state_tensors.items()) or "nothing"
    lead = f"{row.optimizer} keeps {format_gib(total)} on {'each GPU' if each else 'the device'}: {by_name}."
    if not any(item.bytes for item in details.state if item.device == "device"):
        return Section("state", "What does the optimizer keep?", lead, [table])
    drawing = Drawing(
        id="state-map",
        title=f"State{each} by module",
        summary=f"{total:,} bytes{each} in {sum(item.count for item in details.state):,} tensors.",
        figure=state_treemap(details.state),
        table=table,
    )
    return Section("state", "What does the optimizer keep?", lead, [drawing])
