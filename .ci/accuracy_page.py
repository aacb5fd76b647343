"""`docs/accuracy.md`: every committed training step measured on a GPU beside both engines' estimates of it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, NamedTuple

from agreement_section import GAPS, agreement_section, trace_versions, traced_figures
from profiles_section import profiles_section
from ranks_page import ranks_section
from rivals_section import rivals_section

if TYPE_CHECKING:
    from optplan.planner.candidates import Candidate
    from optplan.planner.records import StepConfig
    from optplan.planner.workload import StepPeaks

RECORDS = Path(__file__).resolve().parent.parent / "tests" / "records"
OPTIMIZERS: dict[str, tuple[str, dict[str, str]]] = {
    "adamw": ("adamw", {"implementation": "fused"}),
    "adamw_foreach": ("adamw", {"implementation": "foreach"}),
    "sgd": ("sgd", {"implementation": "fused"}),
    "adafactor": ("adafactor", {"implementation": "transformers"}),
    "adam_mini": ("adam-mini", {"implementation": "official"}),
}
"""Optimizer of a record to the optimizer and implementation of an estimate."""

FLAGS = ("fused_loss", "keep_grads", "padding_mask", "step_in_backward", "clip_grad_norm", "empty_cache")
"""Options of an estimate that a record may name."""


class Figures(NamedTuple):
    """What an engine predicts, less what was measured, as shares of that."""

    peak: float
    reserved: float


class Predicted(NamedTuple):
    """What the rules say of a measured step; the advice of an estimate, which takes longer, is not asked for."""

    config: StepConfig
    candidate: Candidate
    peaks: StepPeaks
    state_is_exact: bool


class Row(NamedTuple):
    """One measured step and its estimates; None where an engine does not describe the step."""

    case: dict[str, Any]
    measured_bytes: int
    rules: Figures | None
    trace: Figures | None
    state_is_exact: bool | None


def accuracy_page() -> str:
    """The whole page."""
    traced = traced_figures()
    names = "public_h200_cases.jsonl", "h200_steps.jsonl"
    rows = [_row(case, traced.get((name, number))) for name in names for number, case in _cases(name)]
    compared = [row.state_is_exact for row in rows if row.state_is_exact is not None]
    num_steps = len(list(_cases("h200_optimizers.jsonl")))
    lines = [
        "# Accuracy",
        "",
        "Written by `make docs` from the measurement records in `tests/records/`: training steps of transformers models"
        " on one H200 (torch 2.11), the third step of each, peak allocated bytes; the tests hold the estimates to them."
        f" The rules are asked anew; the trace was made without a GPU by `python benchmarks/check_agreement.py --measured`"
        f" ({trace_versions()}, the measured version of transformers).",
        "",
        f"- **State and parameters**: {sum(compared)} of {len(compared)} measured steps equal the estimate to the byte.",
        f"- **Optimizer steps**: {num_steps} more records hold one step of one optimizer each: its state by name and every"
        " temporary that it requests; the models equal them to the byte.",
        _summary("Rules, peak allocated", [row.rules.peak for row in rows if row.rules]),
        _summary("Trace, peak allocated", [row.trace.peak for row in rows if row.trace]),
        _summary("Rules, peak reserved", [row.rules.reserved for row in rows if row.rules]),
        _summary("Trace, peak reserved", [row.trace.reserved for row in rows if row.trace]),
        "- **Steps measured with the product's own profiler**: [below](#steps-that-optplan-validate-measured).",
        "- Where cached blocks of one size tie, the addresses that the driver chose decide what is reserved, which nobody"
        " can know beforehand.",
        "",
        *agreement_section(),
        "",
        "## What the gaps are",
        "",
        *(f"- {gap}" for gap in GAPS),
        "",
        "## Measured steps",
        "",
        "| model | precision | optimizer | batch x tokens | accumulated | checkpointing | attention | more | measured GiB"
        " | rules | trace | rules, reserved | trace, reserved |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return (
        "\n".join([*lines, *(_line(row) for row in rows), *profiles_section(), *ranks_section(), *rivals_section()])
        + "\n"
    )


def _summary(what: str, errors: list[float]) -> str:
    sizes = [abs(error) for error in errors]
    near = sum(size <= 0.001 for size in sizes)
    return (
        f"- **{what}**: of {len(sizes)} steps, {near} within 0.1 %; median error {median(sizes):.3%}, mean"
        f" {fmean(sizes):.3%}, largest {max(sizes):.2%}."
    )


def _cases(name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The steps of a record that ran, each with its line."""
    lines = (RECORDS / name).read_text(encoding="utf-8").splitlines()
    cases = enumerate(map(json.loads, lines), start=1)
    return ((number, case) for number, case in cases if "error" not in case)


def _checkpointing(case: dict[str, Any]) -> str:
    """The option of a record, which says true or false for the usual ones."""
    named = {True: "full", False: "none"}
    return named.get(case["checkpointing"], str(case["checkpointing"]))


def _row(case: dict[str, Any], traced: dict[str, Any] | None) -> Row:
    measured = _measured_bytes(case)
    trace = _figures(case, traced["peak_bytes"], traced["reserved_bytes"]) if traced else None
    found = predict(case)
    rules = _figures(case, found.peaks.peak_bytes, found.peaks.reserved_bytes)
    return Row(case, measured, rules, trace, found.state_is_exact)


def _figures(case: dict[str, Any], peak_bytes: int, reserved_bytes: int) -> Figures:
    return Figures(peak_bytes / _measured_bytes(case) - 1, reserved_bytes / case["reserved"] - 1)


def predict(case: dict[str, Any]) -> Predicted:
    """The rules asked about a measured step."""
    from optplan.planner.candidates import choose_optimizers
    from optplan.planner.catalog import load_model
    from optplan.planner.request import check_request
    from optplan.planner.workload import Workload

    with tempfile.TemporaryDirectory() as folder:
        spec = load_model(_model(case, Path(folder)))
    request = check_request(
        spec,
        gpu="h200-141g",
        precision=case["precision"],
        batch_size=case["batch"],
        seq_len=case["seq"],
        grad_accum=case.get("grad_accum", 1),
        checkpointing=_checkpointing(case),
        attention=case["attention"],
        **{name: case[name] for name in FLAGS if name in case},
    )
    workload = Workload(request)
    (candidate,), _ = workload.candidates(choose_optimizers(*OPTIMIZERS[case["optimizer"]]))
    peaks = workload.peaks(candidate)
    assert peaks is not None
    is_exact = workload.resident(candidate).optimizer_state == case["state"] and spec.num_parameters == case["params"]
    return Predicted(request.config, candidate, peaks, is_exact)


def _model(case: dict[str, Any], folder: Path) -> str:
    """The record's own configuration where it holds one, else the catalogue's model."""
    if "config" not in case:
        return str(case["model"])
    path = folder / "config.json"
    path.write_text(json.dumps(case["config"]), encoding="utf-8")
    return str(path)


def _measured_bytes(case: dict[str, Any]) -> int:
    phases = case["phases"] if "phases" in case else case["steps"][-1]
    return max(int(phase["peak"]) for phase in phases.values())


def _line(row: Row) -> str:
    case = row.case
    optimizer, options = OPTIMIZERS[case["optimizer"]]
    cells = [
        case["model"],
        case["precision"],
        f"{optimizer} ({options['implementation']})",
        f"{case['batch']} x {case['seq']}",
        str(case.get("grad_accum", 1)),
        _checkpointing(case),
        case["attention"],
        ", ".join(name.replace("_", " ") for name in FLAGS if case.get(name)) or "-",
        f"{row.measured_bytes / 2**30:.3f}",
        *(f"{engine.peak:+.3%}" if engine else "-" for engine in (row.rules, row.trace)),
        *(f"{engine.reserved:+.2%}" if engine else "-" for engine in (row.rules, row.trace)),
    ]
    return f"| {' | '.join(cells)} |"
