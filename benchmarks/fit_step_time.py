"""Fit the coefficients of the step-time model to measured steps, and state its errors.

    python benchmarks/fit_step_time.py            # fits to all records, prints coefficients and the error of each step
    python benchmarks/fit_step_time.py --write    # writes them, the errors and measured links into step_time.toml
    python benchmarks/fit_step_time.py --check    # errors with the committed coefficients

A step's time is the mean of its second and third: on these hosts two steps of one process differ by up to 26 %. The
honest error is that of models left out: the steps of each model are predicted by a fit to those of all others. Printed
beside it: the same by optimizer.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import msgspec
from link_records import measured_shares

from optplan.planner.candidates import Candidate, choose_optimizers
from optplan.planner.catalog import load_model
from optplan.planner.gpus import load_gpu
from optplan.planner.request import StepRequest, check_request
from optplan.planner.requested_step import step_options
from optplan.planner.step.rules import record_step
from optplan.planner.step_time import combine, micro_steps, optimizer_update
from optplan.planner.step_time_rates import CALIBRATED_GPU, FitError, FitErrors, LinkRates, TimeModel, load_time_model
from optplan.planner.step_time_work import StepWork, step_work
from optplan.planner.workload import Workload

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "tests" / "records" / "public_h200_times.jsonl"
TABLE = ROOT / "planner" / "data" / "step_time.toml"
OPTIMIZERS = {
    "adamw": ("adamw", "fused"),
    "adamw_foreach": ("adamw", "foreach"),
    "sgd": ("sgd", "fused"),
    "adafactor": ("adafactor", "transformers"),
    "adam_mini": ("adam-mini", "official"),
}
"""Names in the records to id and implementation."""

FITTED = (
    ("gpu", "product_share_16bit", 0.70, 0.2),
    ("gpu", "product_share_fp32", 0.75, 0.002),
    ("gpu", "moves_per_written_byte", 5.0, 0.002),
    ("host", "seconds_per_rotary_layer", 3.5e-3, 0.002),
    ("host", "seconds_per_other_layer", 2.5e-3, 0.002),
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
    micro = micro_steps(case.work, case.request, gpu, model=model)
    update = optimizer_update(case.candidate, case.moved_bytes, gpu, case.request, model=model)
    return combine(micro, update, exponent=model.overlap.exponent).step


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
    parts: dict[str, Any] = {name: getattr(start, name) for name in ("gpu", "host")}
    for (part, name, first, _), log in zip(FITTED, logs, strict=True):
        parts[part] = msgspec.structs.replace(parts[part], **{name: first * math.exp(log)})
    return msgspec.structs.replace(start, **parts)


def errors_of(cases: Sequence[Case], model: TimeModel) -> list[float]:
    """How much more than measured each step takes by the model, as a share of the measured time."""
    return [predicted_seconds(case, model) / case.seconds - 1 for case in cases]


def model_of(case: Case) -> str:
    """Name of a step's model."""
    return case.request.model.name


def optimizer_of(case: Case) -> str:
    """Id and implementation of a step's optimizer."""
    return f"{case.candidate.id} {case.candidate.implementation}"


def held_out_errors(cases: Sequence[Case], start: TimeModel, group: Callable[[Case], str] = model_of) -> list[float]:
    """The same for each step by a fit to the steps of all other groups."""
    fits = {
        name: fit([case for case in cases if group(case) != name], start) for name in sorted(set(map(group, cases)))
    }
    return [errors_of([case], fits[group(case)])[0] for case in cases]


def summary(errors: Sequence[float]) -> FitError:
    """The median and the largest of some errors, without their signs."""
    sizes = [abs(error) for error in errors]
    return FitError(round(median(sizes), 3), round(max(sizes), 3))


def show_errors(title: str, cases: Sequence[Case], errors: Sequence[float]) -> None:
    """Print the error of each step, the median and the largest."""
    for case, error in zip(cases, errors, strict=True):
        print(f"  {case.name:44} {case.seconds * 1e3:7.1f} ms  {100 * error:+6.1f} %")
    found = summary(errors)
    print(f"{title}: median {100 * found.median:.1f} %, largest {100 * found.largest:.1f} % of {len(cases)} steps\n")


def written(text: str, model: TimeModel, links: dict[str, LinkRates]) -> str:
    """The table's text with the fitted coefficients, the errors and the measured links."""
    for part, name, *_ in FITTED:
        text = _set(text, name, f"{getattr(getattr(model, part), name):.3g}")
    text = _set(text, "num_steps", str(model.errors.num_steps))
    for name in ("fitted", "held_out"):
        found = getattr(model.errors, name)
        text = _set(text, name, f"{{ median = {found.median}, largest = {found.largest} }}")
    for name, row in links.items():
        fields = f'bandwidth_share = {row.bandwidth_share}\nbasis = "{row.basis}"\nsource = "{row.source}"'
        start = text.index(f'link = "{name}"\n') + len(f'link = "{name}"\n')
        text = text[:start] + fields + text[text.index("\n\n[", start) :]
    return text


def _set(text: str, name: str, value: str) -> str:
    return re.sub(rf"(?m)^{name} = .*$", f"{name} = {value}", text, count=1)


def _refitted(cases: Sequence[Case]) -> TimeModel:
    """The fit to all steps with its errors, each printed."""
    start = load_time_model()
    show_errors("optimizers left out", cases, held_out_errors(cases, start, optimizer_of))
    held_out, model = held_out_errors(cases, start), fit(cases, start)
    show_errors("models left out", cases, held_out)
    for part, name, *_ in FITTED:
        print(f"[{part}] {name} = {getattr(getattr(model, part), name):.3g}")
    errors = FitErrors(len(cases), summary(errors_of(cases, model)), summary(held_out))
    return msgspec.structs.replace(model, errors=errors)


def main() -> None:
    """Fit, write or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    cases = read_cases()
    model = load_time_model() if arguments.check else _refitted(cases)
    show_errors("all", cases, errors_of(cases, model))
    if arguments.write:
        TABLE.write_text(written(TABLE.read_text("utf-8"), model, measured_shares()), "utf-8")


if __name__ == "__main__":
    main()
