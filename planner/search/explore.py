"""Every configuration of the space decided: excluded by memory, beaten by another, or on the front.

Nothing that could be chosen is lost:

- a micro-batch that does not fit beside the smallest state fits with none, and no larger one does (memory grows with
  the batch), so both are decided for all optimizers at once;
- parameters, master weights and state that do not fit exclude an optimizer under every manner and batch;
- a peak is never below its rounded sum, and never below what it is without the optimizer's temporaries: a
  configuration that is beaten in that bound, in time and in evidence by one that fits is beaten.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import msgspec

from optplan.planner.gpus import Gpu
from optplan.planner.request import StepRequest
from optplan.planner.search.evidence import EvidenceKey
from optplan.planner.search.pool import BoundMember, Frame, Pool
from optplan.planner.search.space import Layout, Manner, Space
from optplan.planner.search.steps import StepPoint, StepRecorder, accumulated_batches, manner_refused
from optplan.planner.step_time import micro_steps
from optplan.planner.step_time_overlap import BeforeUpdate, Update, before_update
from optplan.planner.step_time_rates import TimeModel, load_time_model
from optplan.planner.step_time_work import StepWork


class Found(NamedTuple):
    """A configuration that fits by its rounded sums.

    Attributes:
        bound: The optimizer in its frame: number formats, GPUs and sharding.
        manner: How forward and backward are run.
        micro_batch: Sequences of one micro-batch.
        accumulated: Micro-batches of one step.
        peak_bytes: Rounded sum at the peak; of a beaten configuration without the optimizer's temporaries.
        seconds: Time for the tokens of one full step.
        key: Its evidence.
    """

    bound: BoundMember
    manner: Manner
    micro_batch: int
    accumulated: int
    peak_bytes: int
    seconds: float
    key: EvidenceKey

    def beats(self, peak_bytes: int, seconds: float, key: EvidenceKey) -> bool:
        """Whether it is at least as good in memory, time and evidence."""
        return self.peak_bytes <= peak_bytes and self.seconds <= seconds and self.key <= key


class Beaten(NamedTuple):
    """A configuration that fits, and one that is at least as good in everything."""

    found: Found
    by: Found


class Micro(NamedTuple):
    """One way of running forward and backward, with its batch and what passes before the optimizer's step."""

    manner: Manner
    micro_batch: int
    accumulated: int
    share: float
    point: StepPoint
    before: BeforeUpdate


_ROOMY = 0.9


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Without the cycle collector, which finds nothing among the short-lived records and takes a fifth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Exploration:
    """The outcome.

    Attributes:
        front: The configurations that no other beats, in the order of their evidence.
        best: Of every optimizer under every precision, the quickest that fits, beaten or not.
        roomy: The same of those that leave a tenth of the limit, for where the quickest turns out tight.
        beaten: What beats each of them, if anything does.
        least_bytes: Of every optimizer under every precision, the lowest peak of all that were tried, fitting or not.
        least_usual_bytes: The same without the step in backward.
        refused_manners: Manners that cannot be run under a precision, and why.
        counts: How many configurations each rule decided.
    """

    def __init__(self, base: StepRequest, space: Space, gpu: Gpu, *, limit_bytes: int, reserve_bytes: int = 0) -> None:
        self.base, self.space, self.gpu = base, space, gpu
        self.limit_bytes, self._reserve_bytes = limit_bytes, reserve_bytes
        self.model: TimeModel = load_time_model()
        self.pool = Pool(base, space)
        self.front: list[Found] = []
        self.best: dict[BoundMember, Found] = {}
        self.roomy: dict[BoundMember, Found] = {}
        self.beaten: dict[BoundMember, Beaten] = {}
        self.least_bytes: dict[BoundMember, int] = {}
        self.least_usual_bytes: dict[BoundMember, int] = {}
        self.refused_manners: dict[tuple[str, Layout, Manner], str] = {}
        self.counts: Counter[str] = Counter()
        self._recorder = StepRecorder()
        with _collector_paused():
            self._explore()

    def work_of(self, found: Found) -> StepWork:
        """Forward and backward of one micro-step of a configuration."""
        frame, accumulates = found.bound.frame.request, found.accumulated > 1
        return self._recorder.point(frame, found.manner, found.micro_batch, accumulates=accumulates).work

    def _explore(self) -> None:
        for refused in self.pool.refused:
            self.counts["cannot_run"] += len(self.space.manners) * len(self.space.micro_batches[refused.layout.gpus])
        bound: list[tuple[EvidenceKey, BoundMember, list[Micro]]] = []
        for frame in self.pool.frames:
            micros = self._micros(frame)
            bound += [(member.evidence(step_in_backward=False), member, micros) for member in frame.members]
        for _, member, micros in sorted(bound, key=lambda entry: entry[0]):
            self._decide(member, micros)
        self.front.sort(key=lambda found: (found.key, found.seconds, found.peak_bytes))

    def _micros(self, frame: Frame) -> list[Micro]:
        """The ways of running a frame that fit beside the smallest of its members' states."""
        least = min(member.resident_bytes for member in frame.members)
        return [micro for manner in self.space.manners for micro in self._fitting(frame, manner, least)]

    def _fitting(self, frame: Frame, manner: Manner, least: int) -> Iterator[Micro]:
        sizes, num_members = self.space.micro_batches[frame.layout.gpus], len(frame.members)
        reason = manner_refused(frame.request, manner)
        if reason:
            self.refused_manners[frame.precision, frame.layout, manner] = reason
            self.counts["cannot_run"] += num_members * len(sizes)
            return
        for index, size in enumerate(sizes):
            batches = accumulated_batches(self.space.sequences, frame.layout, size)
            accumulated = 1 if manner.step_in_backward else batches
            point = self._recorder.point(frame.request, manner, size, accumulates=accumulated > 1)
            if least + point.least_bytes > self.limit_of(frame):
                if index == 0:
                    self._note_least(frame, manner, point)
                self.counts["larger_batch"] += num_members * (len(sizes) - index)
                return
            yield self._micro(frame, manner, size, accumulated, point)

    def limit_of(self, frame: Frame) -> int:
        """What a steady step of a frame may take: on several GPUs the communication library has its part of each."""
        return self.allowed_bytes(frame) - frame.lost_bytes

    def allowed_bytes(self, frame: Frame) -> int:
        """What the allocator may hold in a frame."""
        return min(self.limit_bytes, frame.request.gpu.usable_bytes - self._reserve_bytes)

    def _micro(self, frame: Frame, manner: Manner, size: int, accumulated: int, point: StepPoint) -> Micro:
        one = micro_steps(point.work, frame.request, self.gpu, model=self.model)
        before = before_update(msgspec.structs.replace(one, count=accumulated), exponent=self.model.overlap.exponent)
        share = size * accumulated * frame.layout.gpus / self.space.sequences
        return Micro(manner, size, accumulated, share, point, before)

    def _note_least(self, frame: Frame, manner: Manner, point: StepPoint) -> None:
        for member in frame.members:
            self._lower(member, manner, member.resident_bytes + point.least_bytes)

    def _lower(self, member: BoundMember, manner: Manner, num_bytes: int) -> None:
        self.least_bytes[member] = min(num_bytes, self.least_bytes.get(member, num_bytes))
        if not manner.step_in_backward:
            self.least_usual_bytes[member] = min(num_bytes, self.least_usual_bytes.get(member, num_bytes))

    def _decide(self, member: BoundMember, micros: list[Micro]) -> None:
        resident, limit = member.resident_bytes, self.limit_of(member.frame)
        if resident > limit:
            self.counts["resident"] += len(micros)
            for micro in micros:
                self._lower(member, micro.manner, resident + micro.point.least_bytes)
            return
        update = member.update(self.gpu, self.model)
        keys = {in_backward: member.evidence(step_in_backward=in_backward) for in_backward in (False, True)}
        for micro in micros:
            found = self._found(member, micro, resident, update, keys[micro.manner.step_in_backward])
            self._settle(found, micro, limit)

    def _found(self, member: BoundMember, micro: Micro, resident: int, update: Update, key: EvidenceKey) -> Found:
        """A configuration with its peak as it would be without the optimizer's temporaries."""
        seconds = micro.before.step_seconds(update, exponent=self.model.overlap.exponent) / micro.share
        bound = resident + micro.point.least_bytes
        return Found(member, micro.manner, micro.micro_batch, micro.accumulated, bound, seconds, key)

    def _settle(self, found: Found, micro: Micro, limit: int) -> None:
        """Decide one configuration: too large, beaten, or on the front."""
        winner = None
        if found.peak_bytes <= limit:
            winner = self._winner(found)
            if winner is None:
                found = self._with_temporaries(found, micro)
                winner = self._winner(found) if found.peak_bytes <= limit else None
        self._lower(found.bound, found.manner, found.peak_bytes)
        if found.peak_bytes > limit:
            self.counts["memory"] += 1
            return
        self._note(found, winner)

    def _winner(self, found: Found) -> Found | None:
        peak, seconds, key = found.peak_bytes, found.seconds, found.key
        return next((other for other in self.front if other.beats(peak, seconds, key)), None)

    def _with_temporaries(self, found: Found, micro: Micro) -> Found:
        member = found.bound
        in_backward = found.manner.step_in_backward
        temporary = member.parameter_temporary_bytes if in_backward else member.temporary_bytes
        return found._replace(peak_bytes=member.resident_bytes + micro.point.peak_bytes(temporary))

    def _note(self, found: Found, winner: Found | None) -> None:
        if found.peak_bytes <= _ROOMY * self.limit_of(found.bound.frame) and _is_surer_or_quicker(
            found, self.roomy.get(found.bound)
        ):
            self.roomy[found.bound] = found
        if _is_surer_or_quicker(found, self.best.get(found.bound)):
            self.best[found.bound] = found
            self.beaten.pop(found.bound, None)
            if winner is not None:
                self.beaten[found.bound] = Beaten(found, winner)
        if winner is not None:
            self.counts["beaten"] += 1
            return
        self.front = [other for other in self.front if not found.beats(other.peak_bytes, other.seconds, other.key)]
        self.front.append(found)
        self.counts["front"] += 1


def _is_surer_or_quicker(found: Found, known: Found | None) -> bool:
    return known is None or (found.key, found.seconds) < (known.key, known.seconds)
