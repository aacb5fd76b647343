"""`optplan published` for the terminal: each figure of a paper beside ours."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from optplan.planner.published import PublishedCheck, PublishedReport
from optplan.reports.terminal.console import Glyphs, glyphs_of

_WIDE = 100
_STYLES = {"passes": "green", "fails": "bold red", "not reproducible": "yellow", "unverified": "dim"}


def render_published(report: PublishedReport, console: Console) -> None:
    """Print the figures in a table where there is room for one, as paragraphs where there is not, then the terms."""
    glyphs = glyphs_of(console)
    if console.width >= _WIDE:
        console.print(_table(report, glyphs))
    else:
        for check in report.checks:
            _print_paragraph(check, console)
    _print_terms(report, console, glyphs)
    counts = ", ".join(f"{number} {status}" for status, number in report.counts.items())
    console.print(f"{len(report.checks)} published figures, checked as of {report.as_of}: {counts}.", style="bold")
    console.print(
        "GiB and MiB are 2^30 and 2^20 bytes, GB is 10^9 bytes, % is the saving against AdamW with fp32 state."
        " Unverified: remembered or derived, not read in print, so it proves nothing. Formulas and readings: --json.",
        style="dim",
    )


def _table(report: PublishedReport, glyphs: Glyphs) -> Table:
    table = Table(box=glyphs.box, pad_edge=False, show_edge=False, header_style="bold")
    table.add_column("Paper", overflow="fold")
    table.add_column("Figure", overflow="fold", ratio=1)
    for title in ("Published", "Ours", "Within"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("Verdict")
    for check in report.checks:
        published, ours, within = _values(check)
        verdict = Text(check.status, _STYLES[check.status])
        table.add_row(check.row.paper, check.row.claim, published, ours, within, verdict)
    return table


def _values(check: PublishedCheck) -> tuple[str, str, str]:
    row = check.row
    more_than = "> " if row.relation == "more than" else ""
    return f"{more_than}{row.value:g} {row.unit}", f"{check.ours:.6g} {row.unit}", f"{row.tolerance:g} {row.unit}"


def _print_paragraph(check: PublishedCheck, console: Console) -> None:
    published, ours, within = _values(check)
    console.print(f"{check.row.paper}: {check.row.claim}")
    console.print(f"  published {published}, ours {ours}, tolerance {within}")
    console.print(Text(f"  {check.status}", _STYLES[check.status]))


def _print_terms(report: PublishedReport, console: Console, glyphs: Glyphs) -> None:
    console.print(Text("\nThe terms that make each figure true, or why none do", "bold"))
    for check in report.checks:
        reason = check.row.not_reproducible or check.row.how
        style = "dim" if check.status == "passes" else _STYLES[check.status]
        console.print(f"{glyphs.bullet} {check.row.claim}: {reason}", style=style)
    console.print()
