"""What today's rules say of a step that was measured or traced."""

from __future__ import annotations

from optplan.planner.comparison import Comparison, compare
from optplan.planner.comparison_sides import side_of_estimate, side_of_measurement
from optplan.planner.errors import ConfigError
from optplan.planner.estimate import estimate
from optplan.planner.measurement import Measurement
from optplan.planner.records import EstimateReport, StepConfig


def expect(record: Measurement) -> EstimateReport:
    """The estimate of the step that the record is of, with the same optimizer, options and settings.

    Raises:
        ConfigError: The step cannot be estimated: its model is none of the catalogue's, its GPU is unknown or there is
            none.
    """
    if record.gpu is None:
        raise ConfigError("a step measured on the CPU has no GPU to be estimated for")
    settings = {name: getattr(record.config, name) for name in StepConfig.__struct_fields__}
    options = {"implementation": record.implementation, **record.options}
    return estimate(record.model.name, gpu=record.gpu.name, optimizer=record.optimizer, options=options, **settings)


def hold_against_rules(record: Measurement, *, label: str = "measured") -> Comparison:
    """The record beside today's estimate of the same step.

    Raises:
        ConfigError: As `expect` does.
    """
    report = expect(record)
    predicted = side_of_estimate(report, report.estimates[0], label="predicted by rules")
    return compare([side_of_measurement(record, label=label), predicted])
