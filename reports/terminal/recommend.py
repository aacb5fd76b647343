"""`optplan recommend` for the terminal: what to run, what is next, the best trade-offs, why the others lost."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from optplan.planner.errors import printable
from optplan.planner.search.describe import named, title_of
from optplan.planner.search.records import SearchReport
from optplan.planner.units import GIB, format_gib
from optplan.reports.terminal.console import Glyphs, glyphs_of

_MOST_ON_FRONT = 12
_COLOURS = {"fits": "green", "tight": "yellow", "does not fit": "red", "recommended": "bold green", "beaten": "dim"}


def render_recommend(report: SearchReport, console: Console) -> None:
    """Print the whole answer."""
    glyphs = glyphs_of(console)
    console.print(_headline(report))
    console.print(_setting(report, glyphs), style="dim")
    _print_best(report, console, glyphs)
    _print_changes(report, console, glyphs)
    _print_front(report, console, glyphs)
    _print_alternatives(report, console, glyphs)
    _print_decided(report, console, glyphs)
    for note in report.notes:
        console.print(f"{glyphs.bullet} {printable(note)}", style="dim")


def _headline(report: SearchReport) -> Text:
    name, best = printable(report.model.name), report.recommendation
    if best is None:
        return Text(f"{name} does not fit on {report.gpu.name} with anything that was searched", "bold red")
    colour = "bold green" if best.verdict == "fits" else "bold yellow"
    return Text(f"{name} on {report.gpu.name}: {title_of(best)} {best.verdict}", colour)


def _setting(report: SearchReport, glyphs: Glyphs) -> str:
    reserve = f", {format_gib(report.reserve_bytes)} left alone" if report.reserve_bytes else ""
    parts = [
        f"{report.model.num_parameters:,} parameters",
        f"{report.sequences_per_step:,} {glyphs.times} {report.seq_len:,} tokens a step",
        f"{format_gib(report.limit_bytes)} to take{reserve}",
        f"prefer {report.prefer}",
    ]
    return f" {glyphs.dot} ".join(parts)


def _print_best(report: SearchReport, console: Console, glyphs: Glyphs) -> None:
    best = report.recommendation
    if best is None:
        return
    console.print()
    console.print(Text.assemble(("Recommended: ", "bold"), (title_of(best), "bold green")))
    for sentence in [*report.reasons, *report.advice]:
        console.print(_bullet(sentence, glyphs))
    console.print(Text(printable(best.command), "cyan"), soft_wrap=True)
    second = report.runner_up
    if second is not None:
        time = f", {second.time.step_seconds:.3g} s a step" if second.time else ""
        peak = format_gib(second.peak_allocated_bytes)
        console.print(
            Text.assemble(
                ("Runner-up: ", "bold"), f"{title_of(second)}: peak {peak}{time}, {second.evidence.class_title}"
            )
        )


def _bullet(sentence: str, glyphs: Glyphs) -> Table:
    line = Table.grid(padding=(0, 1))
    line.add_row(glyphs.bullet, printable(sentence))
    return line


def _print_changes(report: SearchReport, console: Console, glyphs: Glyphs) -> None:
    if report.recommendation is not None:
        return
    console.print()
    if not report.what_would_fit:
        console.print("No single change of the request makes anything fit.")
        return
    console.print(Text("What would make it fit, each change alone", "bold"))
    for change in report.what_would_fit:
        console.print(_bullet(f"{change.text}: {change.configuration}", glyphs))
        console.print(Text(printable(change.command), "cyan"), soft_wrap=True)


def _print_front(report: SearchReport, console: Console, glyphs: Glyphs) -> None:
    if not report.front:
        return
    console.print()
    shown = report.front[:_MOST_ON_FRONT]
    console.print(Text(f"{len(shown)} of {len(report.front)} configurations that no other beats", "bold"))
    table = Table(box=glyphs.box, pad_edge=False, show_edge=False, header_style="bold")
    for title in ("Peak\nGiB", "Step\ns", "Tokens\n/s"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("Evidence", no_wrap=True)
    table.add_column("Configuration", overflow="fold")
    for row in shown:
        time = [f"{row.time.step_seconds:.3g}", f"{row.time.tokens_per_second:,.0f}"] if row.time else ["", ""]
        peak = Text(f"{row.peak_allocated_bytes / GIB:.2f}", _COLOURS[row.verdict])
        table.add_row(peak, *time, row.evidence.class_title, title_of(row))
    console.print(table)


def _print_alternatives(report: SearchReport, console: Console, glyphs: Glyphs) -> None:
    console.print()
    console.print(Text("What became of each optimizer", "bold"))
    table = Table(box=glyphs.box, pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("Its best configuration", overflow="fold")
    table.add_column("Outcome", no_wrap=True)
    table.add_column("Why", overflow="fold")
    for row in report.alternatives:
        name = named(row.optimizer, row.settings, row.state_dtype)
        tried = title_of(row.best) if row.best else f"{name}, {row.precision}"
        table.add_row(tried, Text(row.outcome, _COLOURS.get(row.outcome, "")), printable(row.reason))
    console.print(table)


def _print_decided(report: SearchReport, console: Console, glyphs: Glyphs) -> None:
    row = report.decided
    parts = [
        f"{row.declared:,} configurations decided: {row.cannot_run:,} cannot run",
        f"{row.larger_batch:,} are no smaller than a batch that does not fit beside the smallest state",
        f"{row.resident + row.memory:,} do not fit",
        f"{row.beaten:,} are beaten",
        f"{row.front:,} were on the front, {len(report.front):,} stay",
    ]
    console.print()
    console.print(f" {glyphs.dot} ".join(parts), style="dim")
    console.print(f"Picked by {report.prefer}: {report.rule}", style="dim")
