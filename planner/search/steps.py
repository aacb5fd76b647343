"""Forward and backward of every manner and micro-batch: memory and work, each recorded once."""

from __future__ import annotations

import msgspec

from optplan.planner.errors import ConfigError
from optplan.planner.request import StepRequest, change_request
from optplan.planner.requested_step import step_options
from optplan.planner.search.space import Layout, Manner
from optplan.planner.sharding.clusters import usual_num_nodes
from optplan.planner.step.resident import surrounding_use
from optplan.planner.step.rules import check_step, record_step
from optplan.planner.step_time_work import StepWork, step_work

_AUTOCASTS = ("amp", "fp16-amp")


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

    Precisions with the same dtypes in forward and backward share a record: on one GPU bf16 and mixed. Not amp and
    fp16-amp: the gradient scaler adds to the loss, and kernels that widen float16 by themselves hold less.
    """

    def __init__(self) -> None:
        self.num_recorded = 0
        self._points: dict[tuple[object, ...], StepPoint] = {}

    def point(self, frame: StepRequest, manner: Manner, micro_batch: int, *, accumulates: bool) -> StepPoint:
        """One micro-step of a frame: the request with its precision, GPUs and sharding.

        Raises:
            ConfigError: No rule describes it, or the model's class refuses it.
        """
        key = (_sharing_key(frame), manner, micro_batch, accumulates)
        if key not in self._points:
            self._points[key] = self._record(request_of(frame, manner, micro_batch, 2 if accumulates else 1))
            self.num_recorded += 1
        return self._points[key]

    def _record(self, request: StepRequest) -> StepPoint:
        spec, options, strategy = request.model, step_options(request), request.strategy
        program = record_step(spec, options, strategy=strategy)
        use, base = program.use(), sum(surrounding_use(spec, options, strategy).values())
        return StepPoint(
            base + sum(use["forward"].peak),
            base + sum(use["backward"].peak),
            base + sum(use["backward"].end),
            step_work(spec, options, program),
        )


def _sharing_key(frame: StepRequest) -> tuple[object, ...]:
    config, policy = frame.config, frame.policy
    autocast = config.precision if config.precision in _AUTOCASTS else None
    if config.gpus == 1:
        return policy.parameter_dtype, autocast
    return policy.parameter_dtype, autocast, config.precision == "mixed", config.gpus, config.sharding


def frame_of(base: StepRequest, precision: str, layout: Layout) -> StepRequest:
    """The request with a precision, GPUs and their sharding.

    Raises:
        ConfigError: They contradict each other.
    """
    nodes = usual_num_nodes(layout.gpus, base.gpu.id)
    settings = {"precision": precision, "gpus": layout.gpus, "sharding": layout.sharding, "nodes": nodes}
    return change_request(base, settings | {"step_in_backward": False, "batch_size": 1, "grad_accum": 1})


def request_of(frame: StepRequest, manner: Manner, micro_batch: int, accumulated: int) -> StepRequest:
    """The request of one configuration.

    Raises:
        ConfigError: Two settings contradict each other.
    """
    return change_request(
        frame,
        {
            "checkpointing": manner.checkpointing,
            "fused_loss": manner.fused_loss,
            "step_in_backward": manner.step_in_backward,
            "batch_size": micro_batch,
            "grad_accum": accumulated,
        },
    )


def manner_refused(frame: StepRequest, manner: Manner) -> str | None:
    """Why a manner cannot be run in a frame at all, None if it can."""
    try:
        request = request_of(frame, manner, 1, 1)
        check_step(request.model, step_options(request))
    except ConfigError as error:
        return str(error)
    return None


def accumulated_batches(sequences: int, layout: Layout, micro_batch: int) -> int:
    """Micro-batches of one step on each GPU."""
    return max(1, sequences // (layout.gpus * micro_batch))
