"""A request's step by sums and by simulation, for one size of the micro-batch after another."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import msgspec

from optplan.planner.dtypes import ITEMSIZE_BYTES
from optplan.planner.request import StepRequest
from optplan.planner.requested_step import num_in_flight, step_options
from optplan.planner.shortage import LimitedSteps
from optplan.planner.step.micro_steps import MicroSteps, record_micro_steps
from optplan.planner.step.rules import StepMemory, step_memory
from optplan.planner.step.simulation import StepSimulator
from optplan.planner.tensors import Parameter


class StepSimulators:
    """Makes simulators of a request's steps; micro-steps are recorded once a batch size."""

    def __init__(self, request: StepRequest, parameters: Sequence[Parameter]) -> None:
        """Prepare; nothing is simulated yet.

        Args:
            request: The step.
            parameters: Those that the rank updates.
        """
        self._request, self._parameters = request, parameters
        self._strategy = request.strategy
        self._recorded: dict[int, MicroSteps] = {}
        self._simulators: dict[int, StepSimulator] = {}
        self._limited: dict[int, LimitedSteps] = {}
        self._memories: dict[int, StepMemory] = {}

    def share_records(self, other: StepSimulators) -> None:
        """Have the recorded micro-steps in common with another request's, which makes the same."""
        self._recorded = other._recorded

    def memory(self, batch_size: int) -> StepMemory:
        """Rounded bytes at the ends of the phases."""
        if batch_size not in self._memories:
            options = step_options(self._request, batch_size=batch_size)
            self._memories[batch_size] = step_memory(self._request.rank_model, options, self._strategy)
        return self._memories[batch_size]

    def without_limit(self, batch_size: int) -> StepSimulator:
        """On a device without end."""
        if batch_size not in self._simulators:
            self._simulators[batch_size] = self.make(batch_size)
        return self._simulators[batch_size]

    def within_limit(self, batch_size: int) -> LimitedSteps:
        """On a device that has no more than the GPU leaves to the allocator."""
        if batch_size not in self._limited:
            make = partial(self.make, batch_size)
            self._limited[batch_size] = LimitedSteps(make, allowed_bytes=self._request.gpu.usable_bytes)
        return self._limited[batch_size]

    def make(self, batch_size: int, *, allowed_bytes: int | None = None) -> StepSimulator:
        """A new one, on a device whose allocator may hold so much.

        Raises:
            OutOfMemory: The first step needs more than the allocator may hold.
        """
        dtype, model = self._request.policy.master_dtype, self._request.rank_model
        options = step_options(self._request, batch_size=batch_size)
        if batch_size not in self._recorded:
            self._recorded[batch_size] = record_micro_steps(model, options, self._strategy)
        return StepSimulator(
            model,
            options,
            master_bytes=[p.numel * ITEMSIZE_BYTES[dtype] for p in self._parameters] if dtype else [],
            clips=self._request.config.clip_grad_norm is not None,
            empties_cache=self._request.config.empty_cache,
            settings=self._request.allocator_settings,
            strategy=self._strategy,
            num_in_flight=num_in_flight(self._request),
            allowed_bytes=allowed_bytes,
            recorded=self._recorded[batch_size],
        )


def makes_same_micro_steps(request: StepRequest, other: StepRequest) -> bool:
    """Whether two requests differ in no more than in the allocator's settings, or in GPUs that take the same step."""
    config = msgspec.structs.replace(request.config, alloc_conf=other.config.alloc_conf)
    alike = msgspec.structs.replace(request, config=config, gpu=other.gpu)
    return alike == other and step_options(request) == step_options(other)


def takes_same_optimizer_step(request: StepRequest, other: StepRequest) -> bool:
    """Whether two requests for a model differ in no more than what forward and backward see."""
    ours = request.config
    theirs = msgspec.structs.replace(
        other.config, batch_size=ours.batch_size, seq_len=ours.seq_len, checkpointing=ours.checkpointing
    )
    return ours == theirs and request.model is other.model and request.state_dtype == other.state_dtype
