"""`docs/kernels.md`: what compute-sanitizer found, and what Nsight Compute read of every kernel once it was asked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).resolve().parent.parent / "benchmarks" / "records"


def kernels_page() -> str:
    """The whole page."""
    lines = [
        "# The kernels",
        "",
        "Written by `make docs` from `benchmarks/records/`, which `benchmarks/check_kernels.py` appends to on a GPU. How"
        " they work: [MicroAdam's](kernels-micro-adam.md), [Adapprox's](kernels-adapprox.md); how fast they are:"
        " [speed.md](speed.md).",
        "",
        "## Checks",
        "",
        "Two steps of each optimizer over small tensors of odd shapes in bf16 and fp32, each tensor in an allocation of"
        " its own, under compute-sanitizer on an H200.",
        "",
        "| tool | version | optimizers | errors | commit |",
        "|---|---|---|---|---|",
        *_check_lines(),
        *_profile_section(),
    ]
    return "\n".join(lines) + "\n"


def _profile_section() -> list[str]:
    lines = _profile_lines()
    if not lines:
        return []
    return [
        "",
        "## One step, kernel by kernel",
        "",
        "The tenth step over a bf16 matrix of 4096 x 11008 elements (Adam-mini also over 4096 x 4096 queries, whose"
        " blocks are heads, and a matrix of 4096 x 16384 whose neurons are columns), as Nsight Compute reads it on one"
        " H200. Roofline: the DRAM bytes that the kernel moved over its time, as a part of the bandwidth of a large copy"
        " in the same session. Kernels of a few microseconds cannot reach it.",
        "",
        "| optimizer | kernel | launches | µs | MB | roofline | DRAM % | issue slots % | registers | occupancy % |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *lines,
    ]


def _rows(name: str) -> list[dict[str, Any]]:
    path = RECORDS / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _profile_lines() -> list[str]:
    """The newest readings of each optimizer; launches of the same kernel and grid together, by their time."""
    rows = _rows("h200_kernels.jsonl")
    newest = {row["optimizer"]: _run(row) for row in rows}
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if _run(row) == newest[row["optimizer"]]:
            groups.setdefault((row["optimizer"], _short(row["kernel"]), row["grid"]), []).append(row)
    order = sorted(groups.items(), key=lambda item: (item[0][0], -sum(row["seconds"] for row in item[1])))
    return [_profile_line(optimizer, kernel, launches) for (optimizer, kernel, _), launches in order]


def _run(row: dict[str, Any]) -> tuple[str, str]:
    return row["environment"]["date"], row["environment"]["commit"]


def _profile_line(optimizer: str, kernel: str, launches: list[dict[str, Any]]) -> str:
    seconds, num_bytes = (sum(row[name] for row in launches) for name in ("seconds", "dram_bytes"))
    longest = max(launches, key=lambda row: row["seconds"])
    cells = [
        optimizer,
        f"`{kernel}`",
        str(len(launches)),
        f"{seconds * 1e6:.1f}",
        f"{num_bytes / 1e6:.1f}",
        f"{num_bytes / seconds / longest['copy_bytes_per_s']:.2f}",
        f"{longest['dram_throughput_percent']:.0f}",
        f"{longest['issue_slots_busy_percent']:.0f}",
        f"{longest['registers']:.0f}",
        f"{longest['occupancy_percent']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def _short(kernel: str) -> str:
    """A kernel's name without its types and arguments."""
    return re.sub(r"[<(].*", "", kernel).removeprefix("void ")


def _check_lines() -> list[str]:
    newest = {row["tool"]: row for row in _rows("h200_sanitizer.jsonl")}
    return [
        f"| {tool} | {row['tool_version']} | {', '.join(row['optimizers'])} | {row['num_errors']} |"
        f" {row['environment']['commit'][:7]} |"
        for tool, row in newest.items()
    ]
