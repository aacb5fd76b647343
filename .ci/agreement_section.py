"""The part of `docs/accuracy.md` that holds the two engines against each other, written from the committed records."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

RECORDS = Path(__file__).resolve().parent.parent / "tests" / "records"
Figures = dict[str, Any]

GAPS = (
    "`tiny-opt` amp 5 x 701, `tiny-llama-gqa` fp32 with a padding mask, `tiny-gpt2` fp32 with clipping, `heads-of-256` bf16"
    " 2 x 512 and `odd-heads` amp: the driver put segments at ascending addresses, where the engines assume descending"
    " ones. Of equally large free blocks the lowest is taken, so the addresses decide which block is cut and how much of it stays unsplit; with ascending addresses"
    " the trace equals the measured peaks of all phases to the byte.",
    "`tiny-mixtral` bf16 5 x 701, `t5-base` amp and `flan-t5-large`: the same bytes"
    " are requested, but of several tensors that end at once another is freed first, so that other blocks are cut.",
    "T5: both engines stand for transformers 5.17, the measured version, which leaves T5's learned bias to the unfused"
    " attention kernel; later versions copy it so that a fused kernel takes it, and `--engine trace` says so for the"
    " version that is installed.",
)


def traced_figures() -> dict[tuple[str, int], Figures | None]:
    """What the trace engine recorded for each measured step, by record and line."""
    rows = _rows("agreement_measured.json")
    return {(row["record"], row["line"]): row["trace"] for row in rows}


def trace_versions() -> str:
    """The packages that the measured steps were traced with, in words."""
    text = (RECORDS / "agreement_measured.json").read_text(encoding="utf-8")
    versions = json.loads(text)["versions"]
    return ", ".join(f"{name} {version.partition('+')[0]}" for name, version in versions.items())


def agreement_section() -> list[str]:
    """Lines of the section."""
    rows = _rows("agreement.json")
    pairs = {(row["model"], row["step"]) for row in rows}
    peaks = [_error(row, "peak") for row in rows]
    phases = [_error(row, name) for row in rows for name in row["trace"]["phases"]]
    reserved = [_error(row, "reserved") for row in rows]
    return [
        "## Rules against trace",
        "",
        f"`python benchmarks/check_agreement.py` asks both engines about {len(pairs)} steps of models with few layers,"
        f" {len(rows)} with each optimizer counted; the configurations are in `benchmarks/agreement_cases.toml`. The"
        " tests repeat at least 300 of them and allow 0.2 % in the mean and 1 % at worst, for the peak and for each"
        " phase.",
        "",
        f"- **Peak allocated**: {fmean(peaks):.4%} apart in the mean, {max(peaks):.2%} at worst; {_share(peaks)} within"
        " 0.01 %.",
        f"- **Each phase's peak**: {fmean(phases):.4%} in the mean, {max(phases):.2%} at worst.",
        f"- **Reserved**: {fmean(reserved):.2%} in the mean, {max(reserved):.2%} at worst; {_share(reserved)} within"
        " 0.01 %. One segment more or less is much of a small model.",
        "",
        "| model | steps | peak: mean | worst | phases: worst | the step it is | reserved: worst |",
        "|---|---|---|---|---|---|---|",
        *(_line(model, group) for model, group in _by_model(rows).items()),
    ]


def _line(model: str, rows: list[Figures]) -> str:
    peaks = [_error(row, "peak") for row in rows]
    worst = max(rows, key=_worst_phase)
    where = f"{worst['step']}, {worst['optimizer']}" if _worst_phase(worst) > 0 else "-"
    reserved = max(_error(row, "reserved") for row in rows)
    cells = [
        model,
        str(len(rows)),
        f"{fmean(peaks):.3%}",
        f"{max(peaks):.3%}",
        f"{_worst_phase(worst):.3%}",
        where,
        f"{reserved:.2%}",
    ]
    return f"| {' | '.join(cells)} |"


def _worst_phase(row: Figures) -> float:
    return max(_error(row, name) for name in row["trace"]["phases"])


def _error(row: Figures, name: str) -> float:
    """How far the rules are from the trace, without sign."""
    rules, trace = row["rules"], row["trace"]
    if name in trace["phases"]:
        return float(abs(rules["phases"][name] / trace["phases"][name] - 1))
    return float(abs(rules[f"{name}_bytes"] / trace[f"{name}_bytes"] - 1))


def _share(errors: list[float]) -> str:
    return f"{sum(error <= 0.0001 for error in errors)} of {len(errors)}"


def _by_model(rows: Iterable[Figures]) -> dict[str, list[Figures]]:
    groups: dict[str, list[Figures]] = defaultdict(list)
    for row in rows:
        groups[row["model"]].append(row)
    return groups


def _rows(name: str) -> list[Figures]:
    rows: list[Figures] = json.loads((RECORDS / name).read_text(encoding="utf-8"))["rows"]
    return rows
