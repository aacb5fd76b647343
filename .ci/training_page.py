"""`docs/training.md`: the losses that `benchmarks/train_study.py` recorded, and the selection that the README shares."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

RECORDS = Path(__file__).resolve().parent.parent / "benchmarks" / "records" / "h200_training.jsonl"
YARDSTICK = "torch-adamw"
CURVE_STEPS = (100, 200, 300, 400, 500, 600, 700, 800, 900, 1000)

Row = dict[str, Any]


class Summary(NamedTuple):
    """The runs of one optimizer at its best learning rate, one a seed."""

    optimizer: str
    lr: float
    num_steps: int
    losses: list[float]

    @property
    def mean_loss(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.losses)


def training_rows() -> dict[str, list[Row]]:
    """Rows by optimizer, those of its newest commit alone."""
    rows = [json.loads(line) for line in RECORDS.read_text(encoding="utf-8").splitlines()]
    newest = {row["optimizer"]: row["environment"]["commit"] for row in rows}
    kept: dict[str, list[Row]] = {name: [] for name in newest}
    for row in rows:
        if row["environment"]["commit"] == newest[row["optimizer"]]:
            kept[row["optimizer"]].append(row)
    return kept


def summary_of(rows: Iterable[Row]) -> Summary:
    """What the runs at the best learning rate came to."""
    final = sorted((row for row in rows if row["stage"] == "final"), key=lambda row: row["seed"])
    first = final[0]
    return Summary(first["optimizer"], first["lr"], first["num_steps"], [row["final_validation_loss"] for row in final])


def difference(loss: float, yardstick: float) -> str:
    """By how much a loss is above another, in percent."""
    percent = round(100 * (loss / yardstick - 1), 1)
    return f"{percent:+.1f} %" if percent else "0.0 %"


def training_page() -> str:
    """The whole page."""
    rows = training_rows()
    sections = [_head(rows), _results(rows), _controls(rows), _sweeps(rows), _curves(rows)]
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def _head(rows: dict[str, list[Row]]) -> list[str]:
    row = rows[YARDSTICK][0]
    recipe, corpus, place = row["recipe"], row["corpus"], row["environment"]
    size = recipe["size"]
    setting = (
        f"A GPT over bytes with {row['num_parameters']:,} parameters ({size['layers']} layers, width {size['width']},"
        f" {size['heads']} heads, pre-norm, learned positions, untied head) learns the sources of Python"
        f" {corpus['python']}'s standard library: {corpus['num_files']} files, {corpus['train_bytes']:,} bytes to train on"
        f" and {corpus['validation_bytes']:,} of other files to validate on, SHA-256 `{corpus['sha256'][:16]}…`."
        f" {recipe['num_steps']} steps of {recipe['batch']} × {size['context']} bytes; fp32 parameters, bf16 autocast;"
        f" weight decay {row['weight_decay']} on matrices, gradients clipped to norm"
        f" {recipe['clip_norm']:g}; the learning rate rises over the first {recipe['warm_up'] * 100:g} % of the steps and falls along a cosine"
        f" to a tenth. Data order, initial values and validation set are the same for every optimizer."
    )
    swept = (
        "Each optimizer ran its learning rates, a factor of 2 apart, over the whole length with one seed, until the best had"
        " a worse one on either side; two more seeds ran with the best. Losses are nats a byte on"
        f" {recipe['num_validation_windows'] * size['context']:,} bytes after the last step. {place['gpu']}, torch"
        f" {place['torch']}, commit {place['commit'][:7]}."
    )
    return [
        "# Training with each optimizer",
        "",
        "Written by `make docs` from `benchmarks/records/h200_training.jsonl`. To repeat it on a CUDA GPU:"
        " `python benchmarks/train_study.py --out FILE`.",
        "",
        setting,
        "",
        swept,
    ]


def _results(rows: dict[str, list[Row]]) -> list[str]:
    yardstick = summary_of(rows[YARDSTICK]).mean_loss
    lines = [
        "## Loss after the last step",
        "",
        "| optimizer | betas | learning rate | loss of each seed | mean ± deviation | beside torch's AdamW | state bytes a parameter |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in rows.items():
        summary = summary_of(runs)
        if len(summary.losses) > 1:
            mean, spread = summary.mean_loss, statistics.stdev(summary.losses)
            seeds = " ".join(f"{loss:.4f}" for loss in summary.losses)
            state = runs[0]["state_bytes"] / runs[0]["num_parameters"]
            lines.append(
                f"| {name} | {' '.join(map(str, runs[0]['betas']))} | {summary.lr:g} | {seeds} | {mean:.4f} ± {spread:.4f} | {difference(mean, yardstick)}"
                f" | {state:.2f} |"
            )
    return lines


CONTROLS = (
    ("adamw", "torch-adamw", "torch's fused AdamW"),
    ("adam-mini", "adam-mini-official", "the authors' adam-mini 1.1.1"),
    (
        "micro-adam-bf16",
        "micro-adam-official",
        "the authors' MicroAdam, ista-daslab-optimizers 1.1.15, bf16 parameters",
    ),
    ("micro-adam", "micro-adam-bf16", "the same in bf16 parameters"),
    ("adapprox-short", "adapprox-paper", "the paper's mode, fresh sketches and five iterations a step"),
)


def _controls(rows: dict[str, list[Row]]) -> list[str]:
    lines = [
        "## Controls",
        "",
        "Is a loss the algorithm's, or ours? Each pair has the same seed, learning rate, length and data. Runs that differ in"
        " the order of sums alone drift apart: ours and torch's AdamW are the measure.",
        "",
        "| ours | loss | control | its loss | control beside ours | steps |",
        "|---|---|---|---|---|---|",
    ]
    for ours, control, what in CONTROLS:
        if ours in rows and control in rows:
            a, b = summary_of(rows[ours]), summary_of(rows[control])
            lines.append(
                f"| {ours} | {a.losses[0]:.4f} | {what} | {b.losses[0]:.4f} | {difference(b.losses[0], a.losses[0])}"
                f" | {a.num_steps} |"
            )
    return lines


def _sweeps(rows: dict[str, list[Row]]) -> list[str]:
    lines = ["## Learning rates", "", "| optimizer | loss with the first seed at each learning rate |", "|---|---|"]
    for name, runs in rows.items():
        tried = sorted((row["lr"], row["final_validation_loss"]) for row in runs if row["seed"] == 0)
        if len(tried) > 1:
            cells = " · ".join(f"{lr:g}: {'diverged' if loss is None else f'{loss:.4f}'}" for lr, loss in tried)
            lines.append(f"| {name} | {cells} |")
    return lines


def _curves(rows: dict[str, list[Row]]) -> list[str]:
    lines = [
        "## Curves",
        "",
        "Validation loss by step, mean over the seeds; training losses of every tenth step are in the records.",
        "",
        f"| optimizer | {' | '.join(str(step) for step in CURVE_STEPS)} |",
        f"|---|{'---|' * len(CURVE_STEPS)}",
    ]
    for name, runs in rows.items():
        curves = [dict(row["validation_losses"]) for row in runs if row["stage"] == "final"]
        if all(step in curve for step in CURVE_STEPS for curve in curves):
            means = [statistics.fmean(curve[step] for curve in curves) for step in CURVE_STEPS]
            lines.append(f"| {name} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    return lines
