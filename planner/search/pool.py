"""The optimizers of the space bound to a model under each precision, with what the search asks of them."""

from __future__ import annotations

from functools import cached_property

import msgspec

from optplan.planner.candidates import Candidate, bind_candidate, optimizer_context
from optplan.planner.errors import ConfigError
from optplan.planner.footprint import group_parameters
from optplan.planner.gpus import Gpu
from optplan.planner.request import StepRequest
from optplan.planner.search.evidence import EvidenceKey, evidence_key
from optplan.planner.search.space import Member, Space
from optplan.planner.step.optimizer_step import temporary_bytes, write_optimizer_step
from optplan.planner.step_time import Busy, TimeModel, optimizer_busy
from optplan.planner.tensors import Parameter
from optplan.planner.timeline import TimelineBuilder
from optplan.planner.workload import Workload, resident_bytes


class BoundMember:
    """One optimizer under one precision; what costs time is worked out when it is asked for."""

    def __init__(self, member: Member, candidate: Candidate, workload: Workload) -> None:
        self.member = member
        self.candidate = candidate
        self.workload = workload
        self.precision = workload.request.config.precision

    @cached_property
    def resident_bytes(self) -> int:
        """Parameters, buffers, master weights and state, each tensor rounded up to 512 bytes."""
        return sum(resident_bytes(self.workload.request).values()) + self.candidate.footprint.rounded_device_bytes

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

    def busy(self, gpu: Gpu, model: TimeModel) -> Busy:
        """How long its step keeps GPU and host busy."""
        moved = self.workload.moved_bytes(self.candidate)
        return optimizer_busy(self.candidate, moved, gpu, self.workload.request, model=model)

    def evidence(self, *, step_in_backward: bool) -> EvidenceKey:
        """The order by what is known of it."""
        return evidence_key(
            self.candidate.optimizer,
            self.precision,
            state_dtype=self.member.state_dtype,
            step_in_backward=step_in_backward,
        )


class Refused(msgspec.Struct, frozen=True):
    """An optimizer that cannot run under one precision, and why."""

    member: Member
    precision: str
    reason: str


class Pool:
    """Every member of the space under every precision."""

    def __init__(self, base: StepRequest, space: Space) -> None:
        self.bound: dict[str, list[BoundMember]] = {precision: [] for precision in space.precisions}
        self.refused: list[Refused] = []
        for precision in space.precisions:
            workloads = {
                dtype: self._workload(base, precision, dtype) for dtype in {m.state_dtype for m in space.members}
            }
            seen: set[tuple[object, ...]] = set()
            for member in space.members:
                self._bind(member, workloads[member.state_dtype], seen)

    def _workload(self, base: StepRequest, precision: str, state_dtype: object) -> Workload:
        config = msgspec.structs.replace(base.config, precision=precision)
        return Workload(msgspec.structs.replace(base, config=config, state_dtype=state_dtype or base.state_dtype))

    def _bind(self, member: Member, workload: Workload, seen: set[tuple[object, ...]]) -> None:
        precision = workload.request.config.precision
        try:
            candidate = bind_candidate(workload.request, member.optimizer)
        except ConfigError as error:
            self.refused.append(Refused(member, precision, str(error)))
            return
        own = workload.request.policy.updated_dtype
        key = (candidate.optimizer, member.state_dtype if member.state_dtype != own else None)
        if key in seen:
            self.refused.append(Refused(member, precision, f"{own} is what it keeps its state in anyway"))
            return
        seen.add(key)
        self.bound[precision].append(BoundMember(member, candidate, workload))
