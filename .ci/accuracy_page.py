"""`docs/accuracy.md`: every committed training step measured on a GPU beside today's estimate of it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from ranks_page import ranks_section

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


class Row(NamedTuple):
    """One measured step and its estimate; None where the family has no step rules."""

    case: dict[str, Any]
    measured_bytes: int
    predicted_bytes: int | None
    reserved_bytes: int | None
    state_is_exact: bool

    @property
    def error(self) -> float | None:
        """Predicted over measured peak, less one."""
        return None if self.predicted_bytes is None else self.predicted_bytes / self.measured_bytes - 1

    @property
    def reserved_error(self) -> float | None:
        """Predicted over measured reserved bytes, less one."""
        return None if self.reserved_bytes is None else self.reserved_bytes / self.case["reserved"] - 1


def accuracy_page() -> str:
    """The whole page."""
    rows = [_row(case) for name in ("public_h200_cases.jsonl", "h200_steps.jsonl") for case in _cases(name)]
    errors = [abs(row.error) for row in rows if row.error is not None]
    reserved = [abs(row.reserved_error) for row in rows if row.reserved_error is not None]
    exact = sum(row.state_is_exact for row in rows)
    num_steps = len(list(_cases("h200_optimizers.jsonl")))
    lines = [
        "# Accuracy",
        "",
        "Written by `make docs` from the measurement records in `tests/records/`: training steps of transformers models"
        " on one H200 (torch 2.11), the third step of each, peak allocated bytes; the tests hold the estimates to them.",
        "",
        f"- **State and parameters**: {exact} of {len(rows)} measured steps equal the estimate to the byte.",
        f"- **Optimizer steps**: {num_steps} more records hold one step of one optimizer each: its state by name and every"
        " temporary that it requests; the models equal them to the byte.",
        f"- **Peak allocated**: of {len(errors)} steps in families with step rules, the median error is {median(errors):.3%},"
        f" the largest {max(errors):.2%}.",
        f"- **Peak reserved**: the median error is {median(reserved):.3%}, the largest {max(reserved):.2%}; where cached"
        " blocks of one size tie, the addresses that the driver chose decide, which nobody can know beforehand.",
        "",
        "| model | precision | optimizer | batch x tokens | accumulated | checkpointing | attention | more | measured GiB"
        " | predicted GiB | error | reserved error |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_line(row) for row in rows), *ranks_section()]) + "\n"


def _cases(name: str) -> Iterator[dict[str, Any]]:
    cases = map(json.loads, (RECORDS / name).read_text(encoding="utf-8").splitlines())
    return (case for case in cases if "error" not in case and not _is_beyond_rules(case))


def _is_beyond_rules(case: dict[str, Any]) -> bool:
    """Steps of T5 that the rules refuse, as their own tests say."""
    is_t5 = case.get("config", {}).get("model_type") == "t5"
    return is_t5 and bool(case["checkpointing"] or case.get("padding_mask") or case["attention"] != "sdpa")


def _checkpointing(case: dict[str, Any]) -> str:
    """The option of a record, which says true or false for the usual ones."""
    named = {True: "full", False: "none"}
    return named.get(case["checkpointing"], str(case["checkpointing"]))


def _row(case: dict[str, Any]) -> Row:
    import optplan

    optimizer, options = OPTIMIZERS[case["optimizer"]]
    with tempfile.TemporaryDirectory() as folder:
        report = optplan.estimate(
            _model(case, Path(folder)),
            gpu="h200-141g",
            optimizer=optimizer,
            options=options,
            precision=case["precision"],
            batch_size=case["batch"],
            seq_len=case["seq"],
            grad_accum=case.get("grad_accum", 1),
            checkpointing=_checkpointing(case),
            attention=case["attention"],
            **{name: case[name] for name in FLAGS if name in case},
        )
    (row,) = report.estimates
    exact = row.bytes.optimizer_state == case["state"] and report.model.num_parameters == case["params"]
    return Row(case, _measured_bytes(case), row.peak_allocated_bytes, row.peak_reserved_bytes, exact)


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
        "-" if row.predicted_bytes is None else f"{row.predicted_bytes / 2**30:.3f}",
        "no step rules" if row.error is None else f"{row.error:+.3%}",
        "-" if row.reserved_error is None else f"{row.reserved_error:+.2%}",
    ]
    return f"| {' | '.join(cells)} |"
