"""Forward and backward of every manner and micro-batch: memory and work, each recorded once."""

from __future__ import annotations

import msgspec

from optplan.planner.errors import ConfigError
from optplan.planner.precision import PRECISIONS
from optplan.planner.request import StepRequest, change_request
from optplan.planner.search.space import Layout, Manner
from optplan.planner.step.resident import surrounding_use
from optplan.planner.step.rules import check_step, record_step
from optplan.planner.step_time_work import StepWork, step_work
from optplan.planner.workload import step_options

_AUTOCASTS = {"amp": 16, "fp16-amp": 16}


class StepPoint(msgspec.Struct, frozen=True):
    """One micro-step: bytes in use on top of parameters, master weights and optimizer state, and its work.

    Attributes:
        forward_bytes: At the forward's peak, each request rounded up to 512 bytes.
        backward_bytes: At the backward's peak.
        after_backward_bytes: When the optimizer's step begins.
        work: What it computes and writes.
    """

    forward_bytes: int
    backward_bytes: int
    after_backward_bytes: int
    work: StepWork

    @property
    def least_bytes(self) -> int:
        """The peak if the optimizer's step allocated nothing."""
        return max(self.forward_bytes, self.backward_bytes, self.after_backward_bytes)

    def peak_bytes(self, temporary_bytes: int) -> int:
        """The peak with what the optimizer's step allocates."""
        return max(self.forward_bytes, self.backward_bytes, self.after_backward_bytes + temporary_bytes)


class StepRecorder:
    """Records micro-steps on demand.

    Two precisions with the same dtypes in forward and backward share a record: bf16 and mixed, amp and fp16-amp.
    """

    def __init__(self, request: StepRequest) -> None:
        self.request = request
        self.num_recorded = 0
        self._points: dict[tuple[object, ...], StepPoint] = {}

    def point(self, precision: str, manner: Manner, micro_batch: int, *, accumulates: bool) -> StepPoint:
        """One micro-step.

        Raises:
            ConfigError: No rule describes it, or the model's class refuses it.
        """
        policy = PRECISIONS[precision]
        key = (policy.parameter_dtype, _AUTOCASTS.get(precision), manner, micro_batch, accumulates)
        if key not in self._points:
            self._points[key] = self._record(request_of(self.request, precision, manner, micro_batch, accumulates))
            self.num_recorded += 1
        return self._points[key]

    def _record(self, request: StepRequest) -> StepPoint:
        spec, options = request.model, step_options(request)
        program = record_step(spec, options)
        use, base = program.use(), sum(surrounding_use(spec, options).values())
        return StepPoint(
            base + sum(use["forward"].peak),
            base + sum(use["backward"].peak),
            base + sum(use["backward"].end),
            step_work(spec, options, program),
        )


def request_of(
    base: StepRequest, precision: str, manner: Manner, micro_batch: int, accumulates: bool, accumulated: int = 2
) -> StepRequest:
    """The request of one configuration.

    Raises:
        ConfigError: Two settings contradict each other.
    """
    return change_request(
        base,
        {
            "precision": precision,
            "checkpointing": manner.checkpointing,
            "fused_loss": manner.fused_loss,
            "step_in_backward": manner.step_in_backward,
            "batch_size": micro_batch,
            "grad_accum": accumulated if accumulates else 1,
        },
    )


def manner_refused(base: StepRequest, precision: str, manner: Manner) -> str | None:
    """Why a manner cannot be run under a precision at all, None if it can."""
    try:
        request = request_of(base, precision, manner, 1, False)
        check_step(request.model, step_options(request))
    except ConfigError as error:
        return str(error)
    return None


def accumulated_batches(sequences: int, layout: Layout, micro_batch: int) -> int:
    """Micro-batches of one step on each GPU."""
    return max(1, sequences // (layout.gpus * micro_batch))
