"""What today's rules say of a step that was measured or traced."""

from __future__ import annotations

import msgspec

from optplan.planner.candidates import OptimizerChoice, choose_optimizers
from optplan.planner.catalog import load_model
from optplan.planner.errors import ConfigError
from optplan.planner.estimate import estimate_request
from optplan.planner.measured.comparison import Comparison, compare
from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.sides import Side, side_of_estimate, side_of_measurement
from optplan.planner.records import EstimateReport, StepConfig
from optplan.planner.request import StepRequest, check_request
from optplan.planner.step_timer import host_note
from optplan.planner.workload import Workload


def expect(record: Measurement, *, host_launch_seconds: float | None = None) -> EstimateReport:
    """The estimate of the step that the record is of, with the same optimizer, options and settings, on its host.

    Advice and the largest micro-batch, which no record tells, are left out.

    Args:
        record: The step.
        host_launch_seconds: What the host takes to launch one operation; as the record found it when None.

    Raises:
        ConfigError: The step cannot be estimated: its model is none of the catalogue's, its GPU is unknown or there is
            none.
    """
    request, choices = asked_of(record)
    return _estimated(request, choices, host_launch_seconds or measured_host(record))


def hold_against_rules(record: Measurement, *, label: str = "measured") -> Comparison:
    """The record beside today's estimate of the same step, event by event where the record has its events.

    Raises:
        ConfigError: As `expect` does.
    """
    request, choices = asked_of(record)
    report = _estimated(request, choices, measured_host(record))
    predicted = predicted_side(report, record, label="predicted by rules")
    if record.history is not None:
        workload = Workload(request)
        (candidate,), _ = workload.candidates(choices)
        predicted = msgspec.structs.replace(predicted, history=workload.history(candidate))
    return compare([side_of_measurement(record, label=label), predicted])


def _estimated(request: StepRequest, choices: list[OptimizerChoice], host: float | None) -> EstimateReport:
    """The estimate without advice and the largest micro-batch, which no record tells."""
    return estimate_request(request, choices, host_launch_seconds=host, advises=False)


def predicted_side(report: EstimateReport, record: Measurement, *, label: str) -> Side:
    """What `expect` says of a record as one side of a comparison, with a note on the host that it is timed for."""
    (row,) = report.estimates
    note = host_note(measured_host(record)) if row.step_seconds else None
    return msgspec.structs.replace(side_of_estimate(report, row, label=label), notes=[note] if note else [])


def measured_host(record: Measurement) -> float | None:
    """What the record's host took to launch one operation, in seconds; None where that was not measured."""
    return record.time.host_launch_seconds if record.time else None


def asked_of(record: Measurement) -> tuple[StepRequest, list[OptimizerChoice]]:
    """What an estimate of the step would be asked for, with the optimizer that the record names.

    Raises:
        ConfigError: As `expect` does.
    """
    if record.gpu is None:
        raise ConfigError("a step measured on the CPU has no GPU to be estimated for")
    settings = {name: getattr(record.config, name) for name in StepConfig.__struct_fields__}
    options = {"implementation": record.implementation, **record.options}
    request = check_request(load_model(record.model.name), gpu=record.gpu.name, **settings)
    request = msgspec.structs.replace(request, state_dtype=record.state_dtype)
    return request, choose_optimizers(record.optimizer, options)
