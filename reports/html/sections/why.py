"""Why: the reasons, every optimizer beside the chosen one, what survives of each saving, memory against time."""

from __future__ import annotations

from optplan.planner.records import Estimate, EstimateReport
from optplan.planner.units import format_gib
from optplan.reports.gpu_words import per_gpu
from optplan.reports.html.figures.memory import optimizer_bars
from optplan.reports.html.figures.pareto import front, pareto, step_seconds, why_not
from optplan.reports.html.figures.savings import savings
from optplan.reports.html.parts import Column, Drawing, Part, Points, Section, Table, Value

_LEAD = (
    "All optimizers for the step as asked. State is resident; the peak is what has to fit. A saving in state survives"
    " only as far as the peak still holds the state."
)


def why(report: EstimateReport) -> Section:
    """The section."""
    parts: list[Part] = []
    if report.recommendation is not None:
        parts.append(Points(report.recommendation.reasons))
    rows = [row for row in report.estimates if row.peak_categories]
    if rows:
        parts.append(_peaks(report, rows))
    else:
        parts.append(_table(report))
    known = [row for row in rows if row.saving_against_adamw is not None]
    if known:
        parts.append(_savings(report, known))
    if any(step_seconds(row) is not None for row in rows):
        parts.append(_pareto(report, rows))
    return Section("why", "Why?", _LEAD if len(report.estimates) > 1 else "", parts)


def _peaks(report: EstimateReport, rows: list[Estimate]) -> Drawing:
    chosen = report.recommendation.optimizer if report.recommendation else None
    least = min(rows, key=lambda row: row.peak_allocated_bytes or 0)
    return Drawing(
        id="optimizers",
        title=f"Alive{per_gpu(report.config)} at each optimizer's peak",
        summary=f"The smallest peak is {least.optimizer} with {format_gib(least.peak_allocated_bytes or 0)}; "
        + _how_many_fit(report, rows),
        figure=optimizer_bars(rows, gpu=report.gpu, chosen=chosen),
        table=_table(report),
    )


def _how_many_fit(report: EstimateReport, rows: list[Estimate]) -> str:
    """How many fit, and how many more have room by bytes alone."""
    fitting = sum(bool(row.fits) for row in rows)
    below = sum((row.peak_allocated_bytes or 0) <= report.gpu.usable_bytes for row in rows)
    stay = "stays" if below - fitting == 1 else "stay"
    by_bytes = f"; {below - fitting} more {stay} below the usable memory, but fragmentation leaves no room"
    return f"{fitting} of {len(rows)} fit{by_bytes if below > fitting else ''}."


def _table(report: EstimateReport) -> Table:
    columns = [
        Column("Optimizer"),
        Column("Implementation"),
        Column("State", "bytes"),
        Column("Resident", "bytes"),
        Column("Peak allocated", "bytes"),
        Column("Peak in"),
        Column("Peak reserved", "bytes"),
        Column("Headroom", "bytes"),
        Column("Largest micro-batch", "int"),
        Column("Fits"),
    ]
    return Table(
        id="optimizers-data",
        caption="Every optimizer, bytes per GPU",
        columns=columns,
        rows=[_cells(row) for row in report.estimates],
        tones=[{True: "", False: "bad", None: ""}[row.fits] for row in report.estimates],
        source=f"state and resident: exact, from the inventory; peaks: {report.engine}, optplan {report.version}",
    )


def _cells(row: Estimate) -> list[Value]:
    fits = {True: "yes", False: "no", None: "not known"}[row.fits]
    return [
        row.optimizer, row.implementation, row.bytes.optimizer_state, row.bytes.total, row.peak_allocated_bytes,
        row.peak_phase, row.peak_reserved_bytes, row.headroom_bytes, row.max_batch_size, fits,
    ]  # fmt: skip


def _savings(report: EstimateReport, rows: list[Estimate]) -> Drawing:
    cells: list[list[Value]] = []
    for row in rows:
        saving = row.saving_against_adamw
        assert saving is not None
        cells.append([row.optimizer, saving.state_bytes, saving.peak_bytes, saving.surviving])
    table = Table(
        id="savings-data",
        caption=f"Less than AdamW{per_gpu(report.config)}",
        columns=[
            Column("Optimizer"),
            Column("Saved in state", "bytes"),
            Column("Saved at the peak", "bytes"),
            Column("Survives", "percent"),
        ],
        rows=cells,
        source=f"AdamW's estimate less each optimizer's, same step; {report.engine}",
    )
    lost = [row.optimizer for row in rows if _is_lost(row)]
    return Drawing(
        id="savings",
        title=f"What survives of each saving{per_gpu(report.config)}",
        summary=f"Less than half of the saving is left at the peak for {', '.join(lost)}."
        if lost
        else "At least half of every saving in state is left at the peak.",
        figure=savings(rows),
        table=table,
    )


def _is_lost(row: Estimate) -> bool:
    saving = row.saving_against_adamw
    return saving is not None and saving.surviving is not None and saving.surviving < 0.5


def _pareto(report: EstimateReport, rows: list[Estimate]) -> Drawing:
    timed = [row for row in rows if step_seconds(row) is not None]
    members = ", ".join(row.optimizer for row in front(rows))
    return Drawing(
        id="pareto",
        title=f"Peak memory{per_gpu(report.config)} against the time of a step",
        summary=f"No other is both smaller and faster than {members}.",
        figure=pareto(rows, gpu=report.gpu),
        table=Table(
            id="pareto-data",
            caption=f"Memory{per_gpu(report.config)} and time; why each loser lost",
            columns=[
                Column("Optimizer"),
                Column("Peak allocated", "bytes"),
                Column("Step, ms", "milliseconds"),
                Column("Beaten by"),
            ],
            rows=[
                [row.optimizer, row.peak_allocated_bytes, step_seconds(row), why_not(row, rows) or "on the front"]
                for row in timed
            ],
            source=f"step times: analytic model; peaks: {report.engine}; optplan {report.version}",
        ),
    )
