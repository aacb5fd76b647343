"""Fit the coefficients of the step-time model to measured steps, and state its errors.

    python benchmarks/fit_step_time.py            # fits to all records, prints coefficients and the error of each step
    python benchmarks/fit_step_time.py --check    # errors with the committed coefficients

A step's time is the mean of its second and third: on these hosts two steps of one process differ by up to 25 %. Two
further fits leave every second record out and are held against those.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import msgspec

from optplan.planner.candidates import Candidate, choose_optimizers
from optplan.planner.catalog import load_model
from optplan.planner.gpus import load_gpu
from optplan.planner.request import StepRequest, check_request
from optplan.planner.step.rules import record_step
from optplan.planner.step_time import (
    CALIBRATED_GPU,
    TimeModel,
    combine,
    load_time_model,
    micro_step_busy,
    optimizer_busy,
)
from optplan.planner.step_time_work import StepWork, step_work
from optplan.planner.workload import Workload, step_options

RECORDS = Path(__file__).resolve().parent.parent / "tests" / "records" / "public_h200_times.jsonl"
OPTIMIZERS = {
    "adamw": ("adamw", "fused"),
    "adamw_foreach": ("adamw", "foreach"),
    "sgd": ("sgd", "fused"),
    "adafactor": ("adafactor", "transformers"),
    "adam_mini": ("adam-mini", "official"),
}
"""Names in the records to id and implementation."""

FITTED = (
    ("gpu", "product_share_16bit", 0.72, 0.2),
    ("gpu", "product_share_fp32", 0.75, 0.02),
    ("gpu", "attention_share", 0.42, 0.02),
    ("gpu", "moves_per_written_byte", 3.6, 0.02),
    ("host", "seconds_per_rotary_layer", 3.2e-3, 0.02),
    ("host", "seconds_per_other_layer", 2.3e-3, 0.02),
    ("host", "seconds_per_recomputed_layer", 3.5e-3, 0.02),
    ("host", "seconds_per_tensor", 4.8e-6, 0.02),
    ("overlap", "exponent", 3.6, 0.05),
)
"""Coefficients, where the search starts, and how strongly it is kept there: few records tell products from moves."""


class Case(NamedTuple):
    """One measured step and its work."""

    name: str
    seconds: float
    request: StepRequest
    work: StepWork
    candidate: Candidate
    moved_bytes: int


def read_cases() -> list[Case]:
    """The measured steps of the records."""
    return [_case(json.loads(line)) for line in RECORDS.read_text("utf-8").splitlines()]


def _case(row: dict[str, Any]) -> Case:
    request = check_request(
        load_model(row["model"]),
        gpu=CALIBRATED_GPU,
        precision=row["precision"],
        batch_size=row["batch"],
        seq_len=row["seq"],
        checkpointing="full" if row["checkpointing"] else "none",
        attention=row["attention"],
    )
    options, workload = step_options(request), Workload(request)
    name, implementation = OPTIMIZERS[row["optimizer"]]
    (candidate,), _ = workload.candidates(choose_optimizers(name, {"implementation": implementation}))
    return Case(
        f"{row['model']} {row['precision']} {row['optimizer']} {row['batch']} x {row['seq']}",
        fmean(row["step_seconds"][1:]),
        request,
        step_work(request.model, options, record_step(request.model, options)),
        candidate,
        workload.moved_bytes(candidate),
    )


def predicted_seconds(case: Case, model: TimeModel) -> float:
    """Time of the step by the model."""
    gpu = load_gpu(CALIBRATED_GPU)
    forward, backward = micro_step_busy(case.work, case.request, gpu, model=model)
    update = optimizer_busy(case.candidate, case.moved_bytes, gpu, case.request, model=model)
    return combine(forward, backward, update, exponent=model.overlap.exponent).step


def fit(cases: Sequence[Case], start: TimeModel) -> TimeModel:
    """The coefficients with the least squared relative errors, found by a pattern search on their logarithms."""
    logs = [0.0] * len(FITTED)

    def loss(point: list[float]) -> float:
        model = _moved(start, point)
        errors = [math.log(predicted_seconds(case, model) / case.seconds) ** 2 for case in cases]
        return fmean(errors) + sum(keep * log**2 for (*_, keep), log in zip(FITTED, point, strict=True)) / len(point)

    best, step = loss(logs), 0.2
    while step > 1e-3:
        tries = [(i, d) for i in range(len(logs)) for d in (step, -step)]
        moved = False
        for index, change in tries:
            point = [log + change * (i == index) for i, log in enumerate(logs)]
            if (found := loss(point)) < best - 1e-12:
                best, logs, moved = found, point, True
        step = step if moved else step / 2
    return _moved(start, logs)


def _moved(start: TimeModel, logs: Sequence[float]) -> TimeModel:
    parts: dict[str, Any] = {name: getattr(start, name) for name in ("gpu", "host", "overlap")}
    for (part, name, first, _), log in zip(FITTED, logs, strict=True):
        value = first * math.exp(log)
        parts[part] = msgspec.structs.replace(parts[part], **{name: value})
    return msgspec.structs.replace(start, **parts)


def show_errors(title: str, cases: Sequence[Case], model: TimeModel) -> None:
    """Print the error of each step, the median and the largest."""
    errors = [predicted_seconds(case, model) / case.seconds - 1 for case in cases]
    for case, error in zip(cases, errors, strict=True):
        print(f"  {case.name:44} {case.seconds * 1e3:7.1f} ms  {100 * error:+6.1f} %")
    sizes = [abs(error) for error in errors]
    print(f"{title}: median {100 * median(sizes):.1f} %, largest {100 * max(sizes):.1f} % of {len(sizes)} steps\n")


def main() -> None:
    """Fit or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    only_check = parser.parse_args().check
    cases, model = read_cases(), load_time_model()
    if not only_check:
        for fitted, held_out in ((cases[::2], cases[1::2]), (cases[1::2], cases[::2])):
            show_errors("held out", held_out, fit(fitted, model))
        model = fit(cases, model)
        for part, name, *_ in FITTED:
            print(f"[{part}] {name} = {getattr(getattr(model, part), name):.3g}")
    show_errors("all", cases, model)


if __name__ == "__main__":
    main()
