"""The measured steps that the step-time model is fitted to, each with its work; and how far alike ones differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import msgspec

from optplan.planner.candidates import Candidate, OptimizerChoice, choose_optimizers
from optplan.planner.catalog import load_model
from optplan.planner.measured.expectation import asked_of
from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.record_files import load_record
from optplan.planner.request import StepRequest, check_request
from optplan.planner.requested_step import step_options
from optplan.planner.step.rules import record_step
from optplan.planner.step_time_rates import CALIBRATED_GPU, FittedRecords
from optplan.planner.step_time_work import StepWork, step_work
from optplan.planner.workload import Workload

ROOT = Path(__file__).resolve().parent.parent
TIMES = ROOT / "tests" / "records" / "h200_step_times.jsonl"
OPTIMIZERS = {
    "adamw": ("adamw", "fused"),
    "adamw_foreach": ("adamw", "foreach"),
    "sgd": ("sgd", "fused"),
    "adafactor": ("adafactor", "transformers"),
    "adam_mini": ("adam-mini", "official"),
}
"""Names in the rows of `*_times.jsonl` to id and implementation."""


class Case(NamedTuple):
    """One measured step and its work.

    Attributes:
        name: What it is called in print.
        seconds: The whole step.
        rest_seconds: The step without the optimizer's, None where its phases were not recorded.
        request: How it was run.
        work: Its forward and backward.
        candidate: Its optimizer, which moves `moved_bytes`.
        records: Number of its records in the table.
        host_launch_seconds: What its host took to launch one operation, None where no record of it says.
        untold: Share of the processes of which no record says that, the others being told by `host_launch_seconds`.
        phase_seconds: Its forward and its backward, None where they were not recorded.
    """

    name: str
    seconds: float
    rest_seconds: float | None
    request: StepRequest
    work: StepWork
    candidate: Candidate
    moved_bytes: int
    records: int
    host_launch_seconds: float | None = None
    phase_seconds: tuple[float, float] | None = None
    untold: float = 0.0


def read_cases(records: Sequence[FittedRecords]) -> list[Case]:
    """The measured steps of some records."""
    return [case for index, row in enumerate(records) for case in _cases(ROOT / row.path, index)]


def _cases(path: Path, records: int) -> list[Case]:
    if path.is_dir():
        return [_case_of_measurement(file, records) for file in sorted(path.glob("*.json.gz"))]
    return [_case_of_row(json.loads(line), records) for line in path.read_text("utf-8").splitlines()]


def _case_of_measurement(path: Path, records: int) -> Case:
    """A record, with the times of other processes that took the same step."""
    record = load_record(path)
    assert isinstance(record, Measurement) and record.time is not None and record.time.step_seconds is not None
    request, choices = asked_of(record)
    name, time = path.name.removesuffix(".json.gz"), msgspec.to_builtins(record.time)
    times = [{**time, "host_launch_seconds": [time["host_launch_seconds"]]}, *_times_by_record().get(name, [])]
    seconds, in_step = (
        median(each) for each in ([t["step_seconds"] for t in times], [t["phases"]["step"] for t in times])
    )
    told = [fmean(launches) for t in times if None not in (launches := t["host_launch_seconds"])]
    passes = [t["phases"] for t in times if "forward" in t["phases"]]
    return _case(name, (seconds, seconds - in_step), request, choices, records)._replace(
        host_launch_seconds=fmean(told) if told else None,
        phase_seconds=(median(p["forward"] for p in passes), median(p["backward"] for p in passes)),
        untold=1 - len(told) / len(times),
    )


@cache
def _times_by_record() -> dict[str, list[dict[str, Any]]]:
    """The rows of `record_step_times.py` by the record that has their step."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in TIMES.read_text("utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["record"], []).append(row)
    return found


def _case_of_row(row: dict[str, Any], records: int) -> Case:
    """A row of a `*_times.jsonl`: the first step of a process is its warm-up."""
    request = check_request(
        load_model(row["model"]),
        gpu=CALIBRATED_GPU,
        precision=row["precision"],
        batch_size=row["batch"],
        seq_len=row["seq"],
        checkpointing="full" if row["checkpointing"] else "none",
        attention=row["attention"],
    )
    optimizer, implementation = OPTIMIZERS[row["optimizer"]]
    choices = choose_optimizers(optimizer, {"implementation": implementation})
    name = f"{row['model']} {row['precision']} {row['optimizer']} {row['batch']} x {row['seq']}"
    name += (" checkpointing" if row["checkpointing"] else "") + (" eager" if row["attention"] == "eager" else "")
    return _case(name, (fmean(row["step_seconds"][1:]), None), request, choices, records)


def _case(
    name: str,
    seconds: tuple[float, float | None],
    request: StepRequest,
    choices: Sequence[OptimizerChoice],
    records: int,
) -> Case:
    options, workload = step_options(request), Workload(request)
    (candidate,), _ = workload.candidates(choices)
    work = step_work(request.model, options, record_step(request.model, options, strategy=request.strategy))
    return Case(name, *seconds, request, work, candidate, workload.moved_bytes(candidate), records)


def repeated_errors(cases: Sequence[Case]) -> dict[str, float]:
    """How far each step is from the median of those that differ from it in the optimizer alone, by its name.

    Forward and backward are the same whatever optimizer follows: no model of the work can know more of them than the
    median of three other processes that ran them. The step's own optimizer is added as it was measured.
    """
    groups: dict[tuple[object, ...], list[Case]] = {}
    for case in cases:
        if case.rest_seconds is not None:
            groups.setdefault((case.request.model.name, case.request.config), []).append(case)
    return {
        case.name: (_others_median(case, group) + case.seconds - (case.rest_seconds or 0.0)) / case.seconds - 1
        for group in groups.values()
        for case in group
        if len(group) > 3
    }


def _others_median(case: Case, group: Sequence[Case]) -> float:
    return median(other.rest_seconds or 0.0 for other in group if other is not case)
