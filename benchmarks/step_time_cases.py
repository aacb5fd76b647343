"""The measured steps that the step-time model is fitted to, each with its work; and how far alike ones differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from optplan.planner.candidates import Candidate, OptimizerChoice, choose_optimizers
from optplan.planner.catalog import load_model
from optplan.planner.measured.expectation import asked_of
from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.record_files import load_record
from optplan.planner.measured.step_times import PooledTime, ProcessTime, pooled, read_process_times
from optplan.planner.request import StepRequest, check_request
from optplan.planner.requested_step import step_options
from optplan.planner.step.rules import record_step
from optplan.planner.step_time_rates import CALIBRATED_GPU, FittedRecords
from optplan.planner.step_time_work import StepWork, step_work
from optplan.planner.workload import Workload

ROOT = Path(__file__).resolve().parent.parent
OPTIMIZERS = {
    "adamw": ("adamw", "fused"),
    "adamw_foreach": ("adamw", "foreach"),
    "sgd": ("sgd", "fused"),
    "adafactor": ("adafactor", "transformers"),
    "adam_mini": ("adam-mini", "official"),
}
"""Names in the rows of `public_*_times.jsonl` to id and implementation."""


class Case(NamedTuple):
    """One measured step and its work.

    Attributes:
        name: That of its record.
        time: What it took, over all processes that took it.
        request: How it was run.
        work: Its forward and backward.
        candidate: Its optimizer, which moves `moved_bytes`.
    """

    name: str
    time: PooledTime
    request: StepRequest
    work: StepWork
    candidate: Candidate
    moved_bytes: int

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.time.step_seconds

    @property
    def rest_seconds(self) -> float:
        """The step without the optimizer's."""
        return self.seconds - self.time.phases["step"]


def read_cases(records: Sequence[FittedRecords]) -> list[Case]:
    """The measured steps of some folders of records."""
    return [case for row in records for case in _cases(ROOT / row.path)]


def _cases(folder: Path) -> list[Case]:
    times = read_process_times(folder)
    return [_case(path, times) for path in sorted(folder.glob("*.json.gz"))]


def _case(path: Path, times: dict[str, list[ProcessTime]]) -> Case:
    """A record, with the times of other processes that took the same step."""
    record, name = load_record(path), path.name.removesuffix(".json.gz")
    assert isinstance(record, Measurement)
    time = pooled(record.time, times.get(name, []))
    assert time is not None, f"{name} has no time"
    request, choices = asked_of(record)
    options, workload = step_options(request), Workload(request)
    (candidate,), _ = workload.candidates(choices)
    work = step_work(request.model, options, record_step(request.model, options, strategy=request.strategy))
    return Case(name, time, request, work, candidate, workload.moved_bytes(candidate))


def asked_of_row(row: dict[str, Any]) -> tuple[StepRequest, list[OptimizerChoice]]:
    """What an estimate of the step in a row of `public_*_times.jsonl` would be asked for."""
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
    return request, choose_optimizers(optimizer, {"implementation": implementation})


def process_spread(cases: Sequence[Case]) -> list[float]:
    """How far each process that took a step is from the median of all that took it, where several did."""
    return [
        seconds / case.seconds - 1
        for case in cases
        for seconds in (case.time.all_seconds if len(case.time.all_seconds) > 2 else ())
    ]


def repeated_errors(cases: Sequence[Case]) -> dict[str, float]:
    """How far each step is from the median of those that differ from it in the optimizer alone, by its name.

    Forward and backward are the same whatever optimizer follows: no model of the work can know more of them than the
    median of three other processes that ran them. The step's own optimizer is added as it was measured.
    """
    groups: dict[tuple[object, ...], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.request.model.name, case.request.config), []).append(case)
    return {
        case.name: (_others_median(case, group) + case.time.phases["step"]) / case.seconds - 1
        for group in groups.values()
        for case in group
        if len(group) > 3
    }


def _others_median(case: Case, group: Sequence[Case]) -> float:
    return median(other.rest_seconds for other in group if other is not case)
