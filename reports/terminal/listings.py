"""`optplan models`, `gpus` and `optimizers` for the terminal."""

from __future__ import annotations

from typing import Literal

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from optplan.planner.listings import GpuItem, GpuListing, ImplementationItem, ModelListing, OptimizerListing
from optplan.reports.terminal.console import glyphs_of

_WIDE = 100


def render_models(listing: ModelListing, console: Console) -> None:
    """Print one row a model."""
    table = _table(console, ("Model", "left"), ("Parameters", "right"), ("Family", "left"), ("Peak", "left"))
    if console.width >= _WIDE:
        table.add_column("Also called", overflow="fold")
        table.add_column("As of")
    for item in listing.models:
        peak = "rules" if item.predicts_peak else "-"
        cells = [item.id, f"{item.num_parameters:,}", item.family, peak, ", ".join(item.aliases), item.as_of]
        table.add_row(*cells[: len(table.columns)])
    console.print(table)
    console.print(
        f"{len(listing.models)} models. State and resident bytes are exact for each; the peak of a step is predicted"
        " where it says rules. Sources: --json.",
        style="dim",
    )


def render_gpus(listing: GpuListing, console: Console) -> None:
    """Print one row a GPU."""
    table = _table(console, ("GPU", "left"), ("Usable GiB", "right"), ("Total GiB", "right"), ("Context MiB", "right"))
    if console.width >= _WIDE:
        for title in ("Bandwidth GB/s", "bf16 TFLOP/s", "fp32 TFLOP/s", "To peers GB/s"):
            table.add_column(title, justify="right")
    for item in listing.gpus:
        table.add_row(*_gpu_cells(item)[: len(table.columns)])
    console.print(table)
    console.print(
        f"{len(listing.gpus)} GPUs; ~ marks an estimate. Total: what the driver reports. Context: CUDA context and"
        " loaded kernels, which torch cannot have. GiB = 2^30, MiB = 2^20, GB = 10^9 bytes; FLOP/s dense, by the data"
        " sheet. Sources: --json.",
        style="dim",
    )


def _gpu_cells(item: GpuItem) -> list[str]:
    def mark(basis: str) -> str:
        return "~" if basis == "estimated" else ""

    flops = item.peak_flops
    return [
        item.id,
        f"{item.usable_bytes / 2**30:.2f}",
        f"{mark(item.total_basis)}{item.total_bytes / 2**30:.2f}",
        f"{mark(item.context_basis)}{item.context_bytes / 2**20:.0f}",
        _billions(item.memory_bandwidth_bytes_per_s, 1e9),
        _billions(flops.get("bf16"), 1e12),
        _billions(flops.get("fp32"), 1e12),
        _billions(item.peer_link_bytes_per_s, 1e9),
    ]


def _billions(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:,.0f}"


def render_optimizers(listing: OptimizerListing, console: Console) -> None:
    """Print each optimizer with its evidence, limits, implementations and options."""
    glyphs = glyphs_of(console)
    for item in listing.optimizers:
        console.print(Text.assemble((item.id, "bold"), f"  {item.title}, {item.facts.year}"))
        for sentence in (item.facts.evidence, item.facts.limits):
            console.print(Padding(sentence, (0, 0, 0, 2), expand=False))
        console.print(Padding(f"source: {item.facts.source}", (0, 0, 0, 2), expand=False), style="dim")
        for implementation in item.implementations:
            _print_implementation(implementation, console, glyphs.bullet)
    console.print(f"{len(listing.optimizers)} optimizers. The first implementation is the default.", style="dim")


def _print_implementation(item: ImplementationItem, console: Console, bullet: str) -> None:
    console.print(f"  {bullet} implementation={item.name}{' (default)' if item.default else ''}")
    for option in item.options:
        default = "from the model" if option.default is None else _text(option.default)
        line = f"--set {option.name}={default}: {option.help}; {option.allowed}"
        console.print(Padding(line, (0, 0, 0, 6), expand=False), style="dim")


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _table(console: Console, *columns: tuple[str, Literal["left", "right"]]) -> Table:
    table = Table(box=glyphs_of(console).box, pad_edge=False, show_edge=False, header_style="bold")
    for title, justify in columns:
        table.add_column(title, justify=justify, no_wrap=title in ("Model", "GPU"))
    return table
