"""`optplan timeline` for the terminal: memory over the step, what is alive at its peak, what would lower it."""

from __future__ import annotations

from itertools import pairwise

from rich.console import Console
from rich.table import Table
from rich.text import Text

from optplan.planner.errors import printable
from optplan.planner.timeline_report import CurvePoint, TimelineReport
from optplan.planner.units import GIB, format_bytes, format_gib
from optplan.reports.gpu_words import gpus_in_words, per_copy
from optplan.reports.margin import margin_in_words
from optplan.reports.terminal.bars import LABELS, legend
from optplan.reports.terminal.console import Glyphs, glyphs_of

_CHART_ROWS = 14
_AXIS_WIDTH = 8


def render_timeline(report: TimelineReport, console: Console) -> None:
    """Print the chart, the moment of the peak, its largest tensors and the changes that lower it."""
    glyphs = glyphs_of(console)
    console.print(_headline(report))
    console.print(_setting(report, glyphs), style="dim")
    console.print()
    for line in _chart(report, width=console.width - _AXIS_WIDTH, glyphs=glyphs):
        console.print(line, no_wrap=True, crop=True)
    used = {category for point in report.curve for category in point.categories}
    console.print(legend(used, usable_bytes=report.gpu.usable_bytes, width=console.width, glyphs=glyphs))
    _print_phases(report, console, glyphs)
    _print_alive(report, console, glyphs)
    _print_changes(report, console, glyphs)
    for note in report.notes:
        console.print(f"{glyphs.bullet} {note}", style="dim")


def _headline(report: TimelineReport) -> Text:
    name, verb = printable(report.model.name), "fits" if report.fits else "does not fit"
    margin = margin_in_words(fits=report.fits, headroom_bytes=report.headroom_bytes)
    peak = f"{format_gib(report.peak_allocated_bytes)} allocated, in {report.peak_phase}"
    return Text(
        f"{name} with {report.optimizer} ({report.implementation}) {verb} on {report.gpu.name}{margin}"
        f"{';' if ':' in margin else ':'} peak {peak}",
        "bold green" if report.fits else "bold red",
    )


def _setting(report: TimelineReport, glyphs: Glyphs) -> str:
    config = report.config
    parts = [
        *([f"{gpus_in_words(config)}; memory is that of each GPU"] if config.gpus > 1 else []),
        config.precision,
        f"micro-batch {config.batch_size} {glyphs.times} {config.seq_len} tokens{per_copy(config)}",
        f"checkpointing {config.checkpointing}",
        f"{config.attention} attention",
        f"{report.num_events:,} allocations and frees in a steady step",
        f"{format_gib(report.peak_reserved_bytes)} reserved",
        f"engine {report.engine}",
    ]
    return f" {glyphs.dot} ".join(parts)


def _chart(report: TimelineReport, *, width: int, glyphs: Glyphs) -> list[Text]:
    """Stacked columns of allocated bytes, one a stretch of events, above an axis that names the phases."""
    columns = _columns(report.curve, width)
    top = max(report.peak_allocated_bytes, 1)
    limit = report.gpu.usable_bytes
    scale = max(top, limit) if limit <= 2 * top else top
    limit_row = round(limit / scale * _CHART_ROWS) if limit <= scale else None
    lines = []
    for row in range(_CHART_ROWS, 0, -1):
        line = Text(f"{scale * row / _CHART_ROWS / GIB:6.1f} ", "dim")
        for point in columns:
            glyph, style = _cell(point, row, scale, glyphs)
            line.append(*(("-", "bold red") if row == limit_row and glyph == " " else (glyph, style)))
        lines.append(line)
    return [Text("GiB allocated", "dim"), *lines, *_axis(report, columns, glyphs)]


def _columns(curve: list[CurvePoint], width: int) -> list[CurvePoint]:
    """One point a column: the highest of its stretch, the same point again where the curve is shorter than the row."""
    count = len(curve)
    edges = [count * index // width for index in range(width + 1)]
    return [
        max(curve[low : max(high, low + 1)], key=lambda point: point.allocated_bytes) for low, high in pairwise(edges)
    ]


def _cell(point: CurvePoint, row: int, scale: int, glyphs: Glyphs) -> tuple[str, str]:
    total = 0
    for index, (category, (_, colour)) in enumerate(LABELS.items()):
        total += point.categories.get(category, 0)
        # Ends are rounded, not heights: the column as a whole is right to half a row.
        if round(total / scale * _CHART_ROWS) >= row:
            return glyphs.fills[index], colour
    return " ", ""


def _axis(report: TimelineReport, columns: list[CurvePoint], glyphs: Glyphs) -> list[Text]:
    peak = max(range(len(columns)), key=lambda index: columns[index].allocated_bytes)
    marker = Text(" " * (_AXIS_WIDTH - 1 + peak) + "^", "bold")
    room = len(columns) - peak
    label = f" peak, event {report.peak_event:,}"
    if len(label) < room:
        marker.append(label, "bold")
    names = Text(" " * (_AXIS_WIDTH - 1))
    start = 0
    for index in range(1, len(columns) + 1):
        if index == len(columns) or columns[index].phase != columns[start].phase:
            phase = columns[start].phase
            names.append(_fit(phase, index - start, glyphs), "bold" if phase == report.peak_phase else "dim")
            start = index
    return [marker, names]


def _fit(phase: str, width: int, glyphs: Glyphs) -> str:
    text = phase[: max(0, width - 1)] if width - 1 < len(phase) else phase
    return (glyphs.limit + text).ljust(width)[:width]


def _print_phases(report: TimelineReport, console: Console, glyphs: Glyphs) -> None:
    peaks: dict[str, int] = {}
    for span in report.phases:
        peaks[span.phase] = max(peaks.get(span.phase, 0), span.peak_allocated_bytes)
    text = f" {glyphs.dot} ".join(f"{phase} {format_gib(size)}" for phase, size in peaks.items())
    console.print(f"Peaks by phase: {text}")


def _print_alive(report: TimelineReport, console: Console, glyphs: Glyphs) -> None:
    shown = sum(tensor.bytes for tensor in report.alive)
    console.print()
    console.print(Text(f"Largest of {report.alive_count:,} tensors alive at the peak", "bold"))
    table = Table(box=glyphs.box, pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("Allocated", justify="right", no_wrap=True)
    table.add_column("Category", no_wrap=True)
    table.add_column("Tensor", overflow="fold")
    for tensor in report.alive:
        label, colour = LABELS[tensor.category]
        table.add_row(format_bytes(tensor.bytes), Text(label, colour), printable(tensor.name))
    console.print(table)
    rest = report.alive_count - len(report.alive)
    if rest:
        console.print(f"and {rest:,} smaller ones, {format_gib(report.peak_allocated_bytes - shown)}", style="dim")


def _print_changes(report: TimelineReport, console: Console, glyphs: Glyphs) -> None:
    console.print()
    if not report.changes:
        console.print("No single change of the step lowers this peak.")
        return
    console.print(Text("What would lower this peak, each change alone", "bold"))
    table = Table(box=glyphs.box, pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("Saved\nGiB", justify="right", no_wrap=True)
    table.add_column("Peak\nGiB", justify="right", no_wrap=True)
    table.add_column("Change", overflow="fold")
    if console.width >= 90:
        table.add_column("Why", overflow="fold")
    for change in report.changes:
        row = [f"{change.saved_bytes / GIB:.2f}", f"{change.peak_allocated_bytes / GIB:.2f}", change.change]
        table.add_row(*row, *([change.why] if console.width >= 90 else []))
    console.print(table)
