"""The rules' own timeline of a step that was measured or traced, to be laid over it."""

from __future__ import annotations

import msgspec

from optplan.planner.candidates import bind_candidate
from optplan.planner.estimate import estimate_request
from optplan.planner.measured.expectation import asked_of, measured_host, predicted_side
from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.sides import Side
from optplan.planner.workload import Workload


def expected_side(record: Measurement, *, label: str = "predicted by rules") -> Side:
    """Today's estimate of the recorded step as one side of a comparison, its events included.

    Raises:
        ConfigError: The step cannot be estimated: its model is none of the catalogue's, its GPU is unknown or there is
            none.
    """
    request, (choice,) = asked_of(record)
    workload = Workload(request)
    report = estimate_request(request, [choice], workload=workload, host_launch_seconds=measured_host(record))
    history = workload.history(bind_candidate(request, choice.optimizer))
    return msgspec.structs.replace(predicted_side(report, record, label=label), history=history)
