"""Does it fit: the chosen configuration's numbers and its bar against the GPU's memory."""

from __future__ import annotations

from optplan.planner.estimate_details import focus_of
from optplan.planner.records import Estimate, EstimateReport, GpuRow
from optplan.planner.units import format_gib
from optplan.reports.advice import why_nothing
from optplan.reports.gpu_words import per_copy, per_gpu
from optplan.reports.html.figures.memory import memory_bar
from optplan.reports.html.parts import Column, Drawing, Fact, Facts, Part, Section, Table, Value
from optplan.reports.labels import CATEGORY_NAMES
from optplan.reports.margin import lost_in_words


def headline(report: EstimateReport) -> tuple[str, str]:
    """The answer in one sentence, and its tone."""
    model, rows, count = report.model.name, report.estimates, report.config.gpus
    gpu = f"{count} × {report.gpu.name}" if count > 1 else report.gpu.name
    fitting = [row for row in rows if row.fits]
    if not rows:
        return f"No optimizer can run this step of {model}", "bad"
    if all(row.fits is None for row in rows):
        return f"{model} on {gpu}: the resident bytes fit, the peak is not predicted", ""
    if not fitting:
        row = rows[0]
        lost = lost_in_words(fits=row.fits, headroom_bytes=row.headroom_bytes) if len(rows) == 1 else ""
        return f"{model} does not fit on {gpu}{lost}", "bad"
    if len(rows) == 1:
        return f"{model} with {rows[0].optimizer} fits on {gpu}", "good"
    return f"{model} fits on {gpu}", "good"


def lead(report: EstimateReport) -> str:
    """How many optimizers fit, and which to run."""
    rows, advice = report.estimates, report.recommendation
    count = f"{sum(bool(row.fits) for row in rows)} of {len(rows)} optimizers fit" if len(rows) > 1 else ""
    if advice is None:
        rest = f"recommended: {why_nothing(report)}" if rows and rows[0].phases else ""
    else:
        extra = "" if advice.config == report.config else f" with {advice.config.checkpointing} checkpointing"
        rest = f"run {advice.optimizer}{extra}"
    sentence = "; ".join(part for part in (count, rest) if part)
    return f"{sentence[:1].upper()}{sentence[1:]}." if sentence else ""


def verdict(report: EstimateReport, estimate: Estimate | None) -> Section:
    """The section; `estimate` is the configuration in focus as it would run."""
    row = estimate or (focus_of(report)[0] if report.estimates else None)
    if row is None:
        return Section("fit", "Does it fit?", "No optimizer was left to estimate.", [])
    gpu, parts, count = report.gpu, [_facts(report, row)], report.config.gpus
    if row.peak_categories:
        parts.append(_bar(report, row))
    each = f" on each of {count} GPUs" if count > 1 else ""
    text = (
        f"{row.optimizer} at the peak of a steady step{each}, beside what {gpu.name} leaves to torch's allocator:"
        f" {format_gib(gpu.usable_bytes)} of {format_gib(gpu.total_bytes)}.{_taken_before(gpu)}"
    )
    return Section("fit", "Does it fit?", text, parts)


def _taken_before(gpu: GpuRow) -> str:
    """What of the memory torch's allocator never has."""
    if not gpu.context_bytes:
        return ""
    if not gpu.communication_bytes:
        return f" The context takes {format_gib(gpu.context_bytes)} before."
    return f" The context takes {format_gib(gpu.context_bytes)} and NCCL {format_gib(gpu.communication_bytes)} before."


def _facts(report: EstimateReport, row: Estimate) -> Part:
    engine, each = report.engine, per_gpu(report.config)
    tone = {True: "good", False: "bad", None: ""}[row.fits]
    return Facts(
        [
            Fact(
                f"peak allocated{each}{f', in {row.peak_phase}' if row.peak_phase else ''}",
                row.peak_allocated_bytes,
                engine,
            ),
            Fact(f"headroom{each}", row.headroom_bytes, f"usable less peak, {engine}", tone=tone),
            Fact(f"peak reserved{each}", row.peak_reserved_bytes, f"allocator simulated, {engine}"),
            Fact(f"usable{each}", report.gpu.usable_bytes, "GPU catalogue"),
            _third(row, each),
            Fact(f"largest micro-batch{per_copy(report.config)}", row.max_batch_size, engine, kind="int"),
        ]
    )


def _third(row: Estimate, each: str) -> Fact:
    """The time of a step where the record has one, else what is resident."""
    seconds = (row.step_seconds or {}).get("step")
    if seconds is None:
        return Fact(f"resident{each}", row.bytes.total, "exact, inventory")
    return Fact("time of a step", seconds, f"analytic model{', all GPUs' if each else ''}", "duration")


def _bar(report: EstimateReport, row: Estimate) -> Drawing:
    categories, peak = row.peak_categories or {}, row.peak_allocated_bytes or 0
    present = [name for name in CATEGORY_NAMES if categories.get(name)]
    rows: list[list[Value]] = [[CATEGORY_NAMES[name], categories[name], categories[name] / peak] for name in present]
    largest = max(present, key=lambda name: categories[name])
    table = Table(
        id="memory-data",
        caption=f"Allocated{per_gpu(report.config)} at the peak by category, {row.optimizer}",
        columns=[Column("Category"), Column("At the peak", "bytes"), Column("Share", "percent")],
        rows=[*rows, ["peak allocated", peak, 1.0]],
        source=f"{report.engine}, optplan {report.version}",
    )
    return Drawing(
        id="memory",
        title=f"{'Each' if report.config.gpus > 1 else 'The'} GPU's memory at the peak",
        summary=f"Peak {format_gib(peak)} of {format_gib(report.gpu.usable_bytes)} usable; the largest part is "
        f"{CATEGORY_NAMES[largest]} with {format_gib(categories[largest])}.",
        figure=memory_bar(categories, reserved_bytes=row.peak_reserved_bytes, gpu=report.gpu),
        table=table,
    )
