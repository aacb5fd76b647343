"""Times of one request's step with each optimizer; what they share is recorded once."""

from __future__ import annotations

from functools import cached_property

import msgspec

from optplan.planner.candidates import Candidate
from optplan.planner.errors import ConfigError
from optplan.planner.gpus import Gpu
from optplan.planner.requested_step import step_options
from optplan.planner.step.rules import has_rules, record_step
from optplan.planner.step_time import StepSeconds, combine, is_timed, micro_steps, optimizer_update, timed_gpu
from optplan.planner.step_time_rates import load_time_model
from optplan.planner.step_time_work import StepWork, step_work
from optplan.planner.workload import Workload


class StepTimer:
    """Times the step of a workload."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload

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
        request = request if gpu is None else msgspec.structs.replace(request, gpu=gpu)
        micro = micro_steps(self._work, request, request.gpu, model=model)
        moved = self._workload.moved_bytes(candidate)
        update = optimizer_update(candidate, moved, request.gpu, request, model=model)
        return combine(micro, update, exponent=model.overlap.exponent)
