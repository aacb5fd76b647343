"""Times of one request's step with each optimizer; what they share is recorded once."""

from __future__ import annotations

import math
from functools import cached_property

import msgspec

from optplan.planner.candidates import Candidate
from optplan.planner.errors import ConfigError
from optplan.planner.gpus import Gpu
from optplan.planner.requested_step import step_options
from optplan.planner.step.rules import has_rules, record_step
from optplan.planner.step_time import is_timed, micro_steps, optimizer_update, timed_gpu
from optplan.planner.step_time_overlap import StepSeconds, Update, combine
from optplan.planner.step_time_rates import TimeModel, load_time_model
from optplan.planner.step_time_work import StepWork, step_work
from optplan.planner.workload import Workload


class StepTimer:
    """Times the step of a workload.

    Args:
        workload: What is timed.
        host_launch_seconds: What the host takes to launch one operation, as records of measured steps have it; the host
            that the model is fitted on when None.

    Raises:
        ConfigError: `host_launch_seconds` is no time.
    """

    def __init__(self, workload: Workload, *, host_launch_seconds: float | None = None) -> None:
        self._workload = workload
        self._host_factor = host_factor(host_launch_seconds, load_time_model())

    @cached_property
    def _work(self) -> StepWork | None:
        request = self._workload.request
        if not has_rules(request.model) or not is_timed(request):
            return None
        options = step_options(request)
        try:
            program = record_step(request.model, options, strategy=request.strategy)
            return step_work(request.model, options, program)
        except ConfigError:
            return None

    def seconds(self, candidate: Candidate, *, gpu: Gpu | None = None) -> StepSeconds | None:
        """The step's time, None for a memory budget, for what no rule describes and for GPUs that share layers.

        Args:
            candidate: The optimizer.
            gpu: Where it runs, if not on the workload's GPU; one on which the step allocates the same.
        """
        if timed_gpu(gpu or self._workload.request.gpu) is None or self._work is None:
            return None
        request, model = self._workload.request, load_time_model()
        on_host = msgspec.structs.replace(model, host=model.host.slower(self._host_factor))
        request = request if gpu is None else msgspec.structs.replace(request, gpu=gpu)
        micro = micro_steps(self._work, request, request.gpu, model=on_host)
        moved = self._workload.moved_bytes(candidate)
        update = optimizer_update(candidate, moved, request.gpu, request, model=model)
        return combine(micro, _slower(update, self._host_factor), exponent=model.overlap.exponent)


def host_factor(launch_seconds: float | None, model: TimeModel) -> float:
    """How many times as long as the model's host one takes that launches an operation in so long; 1 where unknown.

    Raises:
        ConfigError: The time is not above 0, or not finite.
    """
    reference = model.host.launch_reference_seconds
    if launch_seconds is None or reference is None:
        return 1.0
    if not 0 < launch_seconds < math.inf:
        raise ConfigError(f"host_launch_seconds must be above 0 and finite, got {launch_seconds}")
    return launch_seconds / reference


def host_note(launch_seconds: float | None) -> str | None:
    """Which host times are predicted for, None where it is the one that the model is fitted on."""
    reference = load_time_model().host.launch_reference_seconds
    if launch_seconds is None or reference is None:
        return None
    return (
        f"times are predicted for a host that takes {launch_seconds * 1e6:.1f} microseconds to launch one operation, as"
        f" was measured; a plain estimate assumes {reference * 1e6:.1f}"
    )


def _slower(update: Update, factor: float) -> Update:
    """The optimizer's step on a host that takes so many times as long."""
    busy = msgspec.structs.replace(update.busy, host=factor * update.busy.host)
    return msgspec.structs.replace(update, busy=busy)
