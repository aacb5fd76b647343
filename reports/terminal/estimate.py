"""`optplan estimate` for the terminal: verdict, recommendation, table, bars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from optplan.planner.errors import printable
from optplan.planner.records import Estimate, EstimateReport
from optplan.planner.timeline import Category
from optplan.planner.units import format_gib
from optplan.reports.advice import why_nothing
from optplan.reports.gpu_words import gpus_in_words, per_copy
from optplan.reports.margin import margin_in_words
from optplan.reports.terminal.bars import legend, stacked_bar
from optplan.reports.terminal.console import Glyphs, glyphs_of


def render_estimate(report: EstimateReport, console: Console) -> None:
    """Print the whole answer."""
    glyphs = glyphs_of(console)
    console.print(_verdict(report))
    console.print(_setting(report, glyphs), style="dim")
    _print_recommendation(report, console, glyphs)
    console.print()
    console.print(_table(report, console.width, glyphs))
    _print_bars(report, console, glyphs)
    if any(row.per_tensor for row in report.estimates):
        _print_tensors(report, console, glyphs)
    _print_notes(report, console, glyphs)


def _verdict(report: EstimateReport) -> Text:
    model, gpu, rows = report.model.name, report.gpu.name, report.estimates
    fitting = [row for row in rows if row.fits]
    if not rows:
        return Text(f"{model}: no optimizer can run this step", "bold red")
    if all(row.fits is None for row in rows):
        return Text(
            f"{model} on {gpu}: the resident bytes fit; the peak is not modelled for this family", "bold yellow"
        )
    if len(rows) == 1:
        (row,) = rows
        verb = "fits" if row.fits else "is not known to fit" if row.fits is None else "does not fit"
        return Text(
            f"{model} with {row.optimizer} {verb} on {gpu}{_margin(row)}", "bold green" if row.fits else "bold red"
        )
    if not fitting:
        return Text(f"{model} does not fit on {gpu} with any of {len(rows)} optimizers", "bold red")
    return Text(f"{model} fits on {gpu} with {len(fitting)} of {len(rows)} optimizers", "bold green")


def _margin(row: Estimate) -> str:
    return margin_in_words(fits=row.fits, headroom_bytes=row.headroom_bytes)


def _setting(report: EstimateReport, glyphs: Glyphs) -> str:
    config, gpu = report.config, report.gpu
    parts = [
        f"{report.model.num_parameters:,} parameters",
        config.precision,
        f"micro-batch {config.batch_size} {glyphs.times} {config.seq_len} tokens{per_copy(config)}",
        *([f"{config.grad_accum} accumulated"] if config.grad_accum > 1 else []),
        f"checkpointing {config.checkpointing}",
        f"{config.attention} attention",
        *([config.alloc_conf] if config.alloc_conf else []),
        f"{gpus_in_words(config)}{'; each' if config.gpus > 1 else ''}: "
        f"{format_gib(gpu.usable_bytes)} usable of {format_gib(gpu.total_bytes)}"
        + (f", {format_gib(gpu.context_bytes)} context" if gpu.context_bytes else "")
        + (f", {format_gib(gpu.communication_bytes)} NCCL" if gpu.communication_bytes else ""),
    ]
    return f" {glyphs.dot} ".join(parts)


def _print_recommendation(report: EstimateReport, console: Console, glyphs: Glyphs) -> None:
    advice = report.recommendation
    console.print()
    if advice is None:
        if any(row.peak_allocated_bytes is not None for row in report.estimates):
            console.print(
                f"Recommended: {why_nothing(report)}; try a shorter --seq-len, other optimizers or a larger GPU",
                style="bold",
            )
        return
    extra = "" if advice.config == report.config else f" with --checkpointing {advice.config.checkpointing}"
    console.print(Text.assemble(("Recommended: ", "bold"), (advice.optimizer + extra, "bold green")))
    for reason in advice.reasons:
        console.print(_bullet(reason, glyphs))
    console.print(Text(printable(advice.command), "cyan"), soft_wrap=True)


def _bullet(sentence: str, glyphs: Glyphs) -> Table:
    line = Table.grid(padding=(0, 1))
    line.add_row(glyphs.bullet, sentence)
    return line


class _Column(NamedTuple):
    """A column of the table, shown from `width` columns of terminal on."""

    title: str
    justify: Literal["left", "right"]
    width: int
    of_peak: bool
    cell: Callable[[Estimate], str]


def _saved(row: Estimate) -> str:
    saving = row.saving_against_adamw
    return f"{_gib(saving.state_bytes)} -> {_gib(saving.peak_bytes)}" if saving else ""


def _surviving(row: Estimate) -> str:
    saving = row.saving_against_adamw
    return f"{saving.surviving:.0%}" if saving and saving.surviving is not None else ""


_COLUMNS = (
    _Column("Optimizer", "left", 0, False, lambda row: row.optimizer),
    _Column("State\nGiB", "right", 0, False, lambda row: _gib(row.bytes.optimizer_state)),
    _Column("Resident\nGiB", "right", 70, False, lambda row: _gib(row.bytes.total)),
    _Column("Peak\nGiB", "right", 0, True, lambda row: _gib(row.peak_allocated_bytes)),
    _Column("Peak\nin", "left", 50, True, lambda row: row.peak_phase or "-"),
    _Column("Reserved\nGiB", "right", 92, True, lambda row: _gib(row.peak_reserved_bytes)),
    _Column("Headroom\nGiB", "right", 58, True, lambda row: _gib(row.headroom_bytes)),
    _Column("Largest\nmicro-batch", "right", 78, True, lambda row: _count(row.max_batch_size)),
    _Column("Saved against adamw,\nstate -> peak GiB", "right", 116, True, _saved),
    _Column("Survives\nat peak", "right", 126, True, _surviving),
)


def _table(report: EstimateReport, width: int, glyphs: Glyphs) -> Table:
    has_peaks = any(row.peak_allocated_bytes is not None for row in report.estimates)
    columns = [column for column in _COLUMNS if width >= column.width and (has_peaks or not column.of_peak)]
    table = Table(box=glyphs.box, pad_edge=False, show_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.title, justify=column.justify, no_wrap=True)
    for row in report.estimates:
        table.add_row(*(column.cell(row) for column in columns), style=_style(row))
    return table


def _gib(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 2**30:.2f}"


def _count(number: int | None) -> str:
    return "-" if number is None else str(number)


def _style(row: Estimate) -> str:
    return {True: "", False: "red", None: "yellow"}[row.fits]


def _print_bars(report: EstimateReport, console: Console, glyphs: Glyphs) -> None:
    rows = [row for row in report.estimates if row.peak_categories]
    if not rows:
        return
    usable = report.gpu.usable_bytes
    scale = max(usable, *(row.peak_allocated_bytes or 0 for row in rows))
    label_width = max(len(row.optimizer) for row in rows)
    width = min(console.width - label_width - 3, 100)
    console.print(Text("\nAlive at the peak, against the usable memory of one GPU", "bold"))
    for row in rows:
        bar = stacked_bar(row.peak_categories or {}, usable_bytes=usable, scale_bytes=scale, width=width, glyphs=glyphs)
        console.print(Text(f"{row.optimizer:<{label_width}} ") + bar, no_wrap=True, crop=True)
    used: set[Category] = {category for row in rows for category in row.peak_categories or {}}
    console.print(legend(used, usable_bytes=usable, width=console.width, glyphs=glyphs))


def _print_tensors(report: EstimateReport, console: Console, glyphs: Glyphs) -> None:
    for row in report.estimates:
        table = Table(
            title=f"{row.optimizer}: state of every parameter", box=glyphs.box, title_justify="left", show_edge=False
        )
        for title in ("Parameter", "State", "Shape", "Dtype", "On"):
            table.add_column(title, overflow="fold")
        table.add_column("Bytes", justify="right")
        for tensor in row.per_tensor or []:
            shape = str(list(tensor.shape))
            table.add_row(
                tensor.parameter or "(shared)", tensor.state, shape, tensor.dtype, tensor.device, f"{tensor.bytes:,}"
            )
        console.print()
        console.print(table)


def _print_notes(report: EstimateReport, console: Console, glyphs: Glyphs) -> None:
    console.print()
    for sentence in _footnotes(report):
        console.print(Padding(_bullet(sentence, glyphs), 0), style="dim")


def _variants(row: Estimate) -> list[str]:
    if not row.state_variants:
        return []
    numbers = ", ".join(f"{name} {format_gib(size)}" for name, size in row.state_variants.items())
    return [f"state: {numbers}, with its options as given {format_gib(row.bytes.optimizer_state)}"]


def _footnotes(report: EstimateReport) -> Sequence[str]:
    notes = [
        "GiB = 2^30 bytes, per GPU. State is exact, and so is resident: parameters, gradients, master weights, state. "
        "Peak is peak allocated memory of a steady step (after the first). Reserved is what the caching allocator takes"
        " from the driver for it on an empty GPU; part of that is cached and given back when memory runs out.",
    ]
    if all(row.peak_allocated_bytes is None for row in report.estimates):
        notes = ["GiB = 2^30 bytes, per GPU. State and resident bytes are exact."]
    notes += report.notes
    notes += [f"{row.optimizer}: {note}" for row in report.estimates for note in (*_variants(row), *row.notes)]
    notes += [f"left out: {skipped.reason}" for skipped in report.skipped]
    return notes
