"""The rules' own timeline of a step that was measured or traced, to be laid over it."""

from __future__ import annotations

import msgspec

from optplan.planner.candidates import bind_candidate, choose_optimizers
from optplan.planner.catalog import load_model
from optplan.planner.errors import ConfigError
from optplan.planner.estimate import estimate_request
from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.sides import Side, side_of_estimate
from optplan.planner.records import StepConfig
from optplan.planner.request import check_request
from optplan.planner.workload import Workload


def expected_side(record: Measurement, *, label: str = "predicted by rules") -> Side:
    """Today's estimate of the recorded step as one side of a comparison, its events included.

    Raises:
        ConfigError: The step cannot be estimated: its model is none of the catalogue's, its GPU is unknown or there is
            none.
    """
    if record.gpu is None:
        raise ConfigError("a step measured on the CPU has no GPU to be estimated for")
    settings = {name: getattr(record.config, name) for name in StepConfig.__struct_fields__}
    request = check_request(load_model(record.model.name), gpu=record.gpu.name, **settings)
    (choice,) = choose_optimizers([record.optimizer], {"implementation": record.implementation, **record.options})
    workload = Workload(request)
    report = estimate_request(request, [choice], workload=workload)
    history = workload.history(bind_candidate(request, choice.optimizer))
    return msgspec.structs.replace(side_of_estimate(report, report.estimates[0], label=label), history=history)
