"""`docs/speed.md`: the newest committed timing of each optimizer, model and dtype."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "records" / "h200_optimizers.jsonl"
PROFILES = ROOT / "tests" / "records" / "h200_profiles"
THEIRS = {"micro-adam-official": "micro-adam", "adapprox-paper": "adapprox"}
"""Rows of the authors' way, and the optimizer of ours to hold beside."""
NAMES = {"micro-adam-official": "ista-daslab-optimizers", "adapprox-paper": "the paper's S-RSI in torch, ours too"}


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
    rows = [_line(newest[key]) for key in sorted(newest) if key[0] not in THEIRS]
    return "\n".join([*lines, *rows, *_beside_theirs(newest), *_in_whole_steps()]) + "\n"


def _beside_theirs(newest: dict[tuple[str, str, str], dict[str, Any]]) -> list[str]:
    """Ours beside the authors' own way, each over torch's AdamW of its own process."""
    lines = [
        "",
        "## Beside the authors' own way",
        "",
        "The same tensors. How many times faster: theirs over torch's AdamW in the same process, over ours likewise.",
        "",
        "| optimizer | theirs | model | dtype | theirs ms | ours ms | times faster | commit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key in sorted(newest):
        ours = newest.get((THEIRS.get(key[0], ""), *key[1:]))
        if ours is None:
            continue
        theirs = newest[key]
        times = [row["ours"]["step_seconds"]["p50"] * 1000 for row in (theirs, ours)]
        faster = theirs["ratio_to_torch"] / ours["ratio_to_torch"]
        cells = [THEIRS[key[0]], NAMES[key[0]], *key[1:], f"{times[0]:.1f}", f"{times[1]:.2f}", f"{faster:.0f}"]
        lines.append(f"| {' | '.join(cells)} | {theirs['environment']['commit'][:7]} |")
    return lines


def _in_whole_steps() -> list[str]:
    """The optimizer's part of whole bf16 training steps, in which nobody waits between two kernels."""
    lines = [
        "",
        "## Within whole training steps",
        "",
        "The optimizer's part of a training step (2 x 1024 tokens, bf16) as `optplan profile` measured it on an H200,"
        " while another GPU of the host was busy; by optimizer and implementation, ms, and how much of the copy"
        " bandwidth its bytes reach. The host's time counts where it is longer than the GPU's.",
        "",
        "| optimizer | implementation | model | ms | of the copy bandwidth |",
        "|---|---|---|---|---|",
    ]
    rows = []
    for path in PROFILES.glob("*.json.gz"):
        record = json.loads(gzip.decompress(path.read_bytes()))
        config, time = record["config"], record["time"]
        is_plain = config["precision"] == "bf16" and (config["batch_size"], config["seq_len"]) == (2, 1024)
        if not is_plain or time is None or "step" not in time["phases"]:
            continue
        share = time["optimizer_copy_fraction"]
        cells = [record["optimizer"], record["implementation"], record["model"]["name"]]
        cells += [f"{time['phases']['step'] * 1000:.2f}", "" if share is None else f"{share:.2f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return [*lines, *sorted(rows)]


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
