"""What today's rules say of a step that was measured or traced."""

from __future__ import annotations

import msgspec

from optplan.planner.candidates import OptimizerChoice, choose_optimizers
from optplan.planner.catalog import load_model
from optplan.planner.errors import ConfigError
from optplan.planner.estimate import estimate_request
from optplan.planner.measured.comparison import Comparison, compare
from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.sides import side_of_estimate, side_of_measurement
from optplan.planner.records import EstimateReport, StepConfig
from optplan.planner.request import StepRequest, check_request
from optplan.planner.workload import Workload


def expect(record: Measurement) -> EstimateReport:
    """The estimate of the step that the record is of, with the same optimizer, options and settings.

    Raises:
        ConfigError: The step cannot be estimated: its model is none of the catalogue's, its GPU is unknown or there is
            none.
    """
    request, choices = asked_of(record)
    return estimate_request(request, choices)


def hold_against_rules(record: Measurement, *, label: str = "measured") -> Comparison:
    """The record beside today's estimate of the same step, event by event where the record has its events.

    Raises:
        ConfigError: As `expect` does.
    """
    request, choices = asked_of(record)
    report = estimate_request(request, choices)
    predicted = side_of_estimate(report, report.estimates[0], label="predicted by rules")
    if record.history is not None:
        workload = Workload(request)
        (candidate,), _ = workload.candidates(choices)
        predicted = msgspec.structs.replace(predicted, history=workload.history(candidate))
    return compare([side_of_measurement(record, label=label), predicted])


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
