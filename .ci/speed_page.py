"""`docs/speed.md`: the newest committed timing of each optimizer, model and dtype."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).resolve().parent.parent / "benchmarks" / "records" / "h200_optimizers.jsonl"


def newest_rows() -> dict[tuple[str, str, str], dict[str, Any]]:
    """The newest row of each optimizer, model and dtype."""
    newest: dict[tuple[str, str, str], dict[str, Any]] = {}
    for line in RECORDS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        newest[row["optimizer"], row["model"], row["dtype"]] = row
    return newest


def speed_page() -> str:
    """The whole page."""
    newest = newest_rows()
    lines = [
        "# Speed of the optimizers",
        "",
        "Written by `make docs` from `benchmarks/records/`: one step over the model's tensors on one H200, in turns with torch's"
        " `AdamW(fused=True)` of the same dtypes in the same process; medians of GPU time. Roofline: the bytes that the"
        " step must move, at the copy bandwidth measured in that process, over the time it took.",
        "",
        "| optimizer | model | dtype | step ms | torch AdamW ms | ratio | roofline | host ms (torch) | commit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_line(newest[key]) for key in sorted(newest))]) + "\n"


def _line(row: dict[str, Any]) -> str:
    def milliseconds(whose: str, what: str) -> str:
        return f"{row[whose][what]['p50'] * 1000:.2f}"

    model = row["model"]
    if row["left_out_layers"]:
        model += f", {row['left_out_layers']} layers left out (memory)"
    cells = [
        row["optimizer"],
        model,
        row["dtype"],
        milliseconds("ours", "step_seconds"),
        milliseconds("torch", "step_seconds"),
        f"{row['ratio_to_torch']:.3f}",
        f"{row['roofline_fraction']:.2f}",
        f"{milliseconds('ours', 'host_seconds')} ({milliseconds('torch', 'host_seconds')})",
        row["environment"]["commit"][:7],
    ]
    return f"| {' | '.join(cells)} |"
