"""The optimizers of the space bound to a model in each frame, with what the search asks of them."""

from __future__ import annotations

from functools import cached_property

import msgspec

from optplan.planner.candidates import Candidate, bind_candidate, optimizer_context
from optplan.planner.dtypes import Dtype
from optplan.planner.errors import ConfigError
from optplan.planner.footprint import group_parameters
from optplan.planner.gpus import Gpu
from optplan.planner.request import StepRequest
from optplan.planner.requested_step import resident_bytes
from optplan.planner.search.evidence import EvidenceKey, evidence_key
from optplan.planner.search.space import Layout, Member, Space
from optplan.planner.search.steps import frame_of
from optplan.planner.step.optimizer_step import temporary_bytes, write_optimizer_step
from optplan.planner.step_time import optimizer_update
from optplan.planner.step_time_overlap import Update
from optplan.planner.step_time_rates import TimeModel
from optplan.planner.tensors import Parameter
from optplan.planner.timeline import TimelineBuilder
from optplan.planner.workload import Workload


class Frame:
    """A precision on a number of GPUs under one sharding.

    Attributes:
        request: The step with these.
        layout: GPUs and sharding.
        lost_bytes: What a step before the steady ones needs more, and the limit is lower by.
        members: The optimizers that can run in it.
    """

    def __init__(self, request: StepRequest, layout: Layout) -> None:
        self.request = request
        self.layout = layout
        self.lost_bytes = request.gpu.usable_bytes - Workload(request).usable_bytes
        self.members: list[BoundMember] = []

    @property
    def precision(self) -> str:
        """Its number formats."""
        return self.request.config.precision

    @cached_property
    def weight_bytes(self) -> int:
        """Parameters, buffers and master weights, each tensor rounded up to 512 bytes."""
        return sum(resident_bytes(self.request).values())


class BoundMember:
    """One optimizer in one frame; what costs time is worked out when it is asked for."""

    def __init__(self, member: Member, candidate: Candidate, frame: Frame, workload: Workload) -> None:
        self.member = member
        self.candidate = candidate
        self.frame = frame
        self.workload = workload
        self.precision = frame.precision

    @cached_property
    def resident_bytes(self) -> int:
        """Parameters, buffers, master weights and state, each tensor rounded up to 512 bytes."""
        return self.frame.weight_bytes + self.candidate.footprint.rounded_device_bytes

    @cached_property
    def temporary_bytes(self) -> int:
        """Most that the optimizer's step has allocated at once besides its state."""
        return self.workload.temporary_bytes(self.candidate)

    @cached_property
    def parameter_temporary_bytes(self) -> int:
        """The same where each parameter's step is taken in backward: parameters that are alike are asked once."""
        groups = group_parameters(self.workload.request.model.unique_parameters)
        return max(self._temporary_bytes_of(members[0]) for _, members in groups)

    def _temporary_bytes_of(self, parameter: Parameter) -> int:
        request, timeline = self.workload.request, TimelineBuilder("step")
        write_optimizer_step(
            timeline,
            self.candidate.optimizer,
            [parameter],
            optimizer_context(request),
            master=request.policy.master_dtype,
        )
        return temporary_bytes(timeline.events)

    def update(self, gpu: Gpu, model: TimeModel) -> Update:
        """How long its step takes."""
        moved = self.workload.moved_bytes(self.candidate)
        return optimizer_update(self.candidate, moved, gpu, self.workload.request, model=model)

    def evidence(self, *, step_in_backward: bool) -> EvidenceKey:
        """The order by what is known of it."""
        return evidence_key(
            self.candidate.optimizer,
            self.precision,
            state_dtype=self.workload.request.state_dtype,
            step_in_backward=step_in_backward,
        )


class Refused(msgspec.Struct, frozen=True):
    """An optimizer that cannot run in one frame, and why."""

    member: Member
    precision: str
    layout: Layout
    reason: str


class Pool:
    """Every member of the space in every frame.

    Attributes:
        frames: Those that can be run with at least one optimizer.
        refused: The members that cannot run, by frame.
    """

    def __init__(self, base: StepRequest, space: Space) -> None:
        self.frames: list[Frame] = []
        self.refused: list[Refused] = []
        for layout in space.layouts:
            for precision in space.precisions:
                self._add(base, space, precision, layout)

    @property
    def bound(self) -> list[BoundMember]:
        """All of them, frame by frame."""
        return [member for frame in self.frames for member in frame.members]

    def _add(self, base: StepRequest, space: Space, precision: str, layout: Layout) -> None:
        try:
            frame = Frame(frame_of(base, precision, layout), layout)
        except ConfigError as error:
            self.refused += [Refused(member, precision, layout, str(error)) for member in space.members]
            return
        workloads = {dtype: _workload(frame.request, dtype) for dtype in {m.state_dtype for m in space.members}}
        seen: set[tuple[object, ...]] = set()
        for member in space.members:
            self._bind(member, frame, workloads[member.state_dtype], seen)
        self.frames += [frame] if frame.members else []

    def _bind(self, member: Member, frame: Frame, workload: Workload, seen: set[tuple[object, ...]]) -> None:
        own = frame.request.policy.updated_dtype
        try:
            candidate = bind_candidate(workload.request, member.optimizer)
        except ConfigError as error:
            self._refuse(member, frame, str(error))
            return
        key = (candidate.optimizer, member.state_dtype if member.state_dtype != own else None)
        if key in seen:
            self._refuse(member, frame, f"{own} is what it keeps its state in anyway")
            return
        seen.add(key)
        frame.members.append(BoundMember(member, candidate, frame, workload))

    def _refuse(self, member: Member, frame: Frame, reason: str) -> None:
        self.refused.append(Refused(member, frame.precision, frame.layout, reason))


def _workload(request: StepRequest, state_dtype: Dtype | None) -> Workload:
    return Workload(msgspec.structs.replace(request, state_dtype=state_dtype or request.state_dtype))
