"""Measured steps run through the trace engine, for `optplan validate --trace`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from optplan.planner.errors import ConfigError
from optplan.planner.measured.expectation import asked_of
from optplan.planner.measured.measurement import Measurement
from optplan.planner.records import StepConfig
from optplan.planner.request import StepRequest
from optplan.planner.workload import StepPeaks
from optplan.profilers.estimation import TracedWorkload
from optplan.profilers.workloads.source import CatalogueSource


class RecordTracer:
    """Traces the steps of records; those that differ in the optimizer alone share one run of the model."""

    def __init__(self) -> None:
        """Nothing is traced yet."""
        self._shared: tuple[str, StepConfig] | None = None
        self._workload: TracedWorkload | None = None

    def peaks(self, record: Measurement) -> StepPeaks:
        """What the trace engine says of the step.

        Raises:
            ConfigError: The step cannot be traced.
        """
        request, choices = asked_of(record)
        workload = self._workload_of(record, request)
        (candidate,), _ = workload.candidates(choices)
        return workload.peaks(candidate)

    def _workload_of(self, record: Measurement, request: StepRequest) -> TracedWorkload:
        shared = record.model.name, record.config
        if self._workload is None or self._shared != shared:
            self._shared = shared
            self._workload = TracedWorkload(request, CatalogueSource(request.model), searches=False)
        return self._workload


def shared_runs_together(records: Mapping[str, Measurement]) -> list[str]:
    """The records' names in an order in which those that share a run of the model stand together."""
    return sorted(records, key=lambda name: (records[name].model.name, str(records[name].config)))


def trace_records(
    records: Mapping[str, Measurement], *, tell: Callable[[str], None] = lambda _: None
) -> dict[str, StepPeaks | str]:
    """The trace engine's peaks of each record by its name, or why there are none.

    Args:
        records: Measured steps by name.
        tell: Told of each before it is traced.
    """
    tracer, found = RecordTracer(), dict[str, StepPeaks | str]()
    for number, name in enumerate(shared_runs_together(records), start=1):
        tell(f"tracing {number} of {len(records)}: {name}")
        try:
            found[name] = tracer.peaks(records[name])
        except ConfigError as error:
            found[name] = str(error)
    return found
