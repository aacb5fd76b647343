"""Every configuration of the space decided: excluded by memory, beaten by another, or on the front.

Nothing that could be chosen is lost:

- a micro-batch that does not fit beside the smallest state fits with none, and no larger one does (memory grows with
  the batch), so both are decided for all optimizers at once;
- parameters, master weights and state that do not fit exclude an optimizer under every manner and batch;
- a peak is never below its rounded sum, and never below what it is without the optimizer's temporaries: a
  configuration that is beaten in that bound, in time and in evidence by one that fits is beaten.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from optplan.planner.gpus import Gpu
from optplan.planner.request import StepRequest
from optplan.planner.search.evidence import EvidenceKey
from optplan.planner.search.pool import BoundMember, Pool
from optplan.planner.search.space import Layout, Manner, Space
from optplan.planner.search.steps import StepPoint, StepRecorder, accumulated_batches, manner_refused
from optplan.planner.step_time import Busy, TimeModel, load_time_model, longer, phase_busy
from optplan.planner.step_time_work import StepWork


class Found(NamedTuple):
    """A configuration that fits by its rounded sums.

    Attributes:
        bound: The optimizer under its precision.
        manner: How forward and backward are run.
        layout: GPUs and sharding.
        micro_batch: Sequences of one micro-batch.
        accumulated: Micro-batches of one step.
        peak_bytes: Rounded sum at the peak; of a beaten configuration without the optimizer's temporaries.
        seconds: Time for the tokens of one full step.
        key: Its evidence.
    """

    bound: BoundMember
    manner: Manner
    layout: Layout
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
    """One way of running forward and backward, with its batch and the time it takes for a whole step."""

    manner: Manner
    layout: Layout
    micro_batch: int
    accumulated: int
    share: float
    point: StepPoint
    busy: Busy


class Exploration:
    """The outcome.

    Attributes:
        front: The configurations that no other beats, in the order of their evidence.
        best: Of every optimizer under every precision, the quickest that fits, beaten or not.
        beaten: What beats each of them, if anything does.
        least_bytes: Of every optimizer under every precision, the lowest peak of all that were tried, fitting or not.
        least_usual_bytes: The same without the step in backward.
        refused_manners: Manners that cannot be run under a precision, and why.
        counts: How many configurations each rule decided.
    """

    def __init__(self, base: StepRequest, space: Space, gpu: Gpu, *, limit_bytes: int) -> None:
        self.base, self.space, self.gpu, self.limit_bytes = base, space, gpu, limit_bytes
        self.model: TimeModel = load_time_model()
        self.pool = Pool(base, space)
        self.front: list[Found] = []
        self.best: dict[BoundMember, Found] = {}
        self.beaten: dict[BoundMember, Beaten] = {}
        self.least_bytes: dict[BoundMember, int] = {}
        self.least_usual_bytes: dict[BoundMember, int] = {}
        self.refused_manners: dict[tuple[str, Manner], str] = {}
        self.counts: Counter[str] = Counter()
        self._recorder = StepRecorder(base)
        self._explore()

    def work_of(self, found: Found) -> StepWork:
        """Forward and backward of one micro-step of a configuration."""
        return self._recorder.point(
            found.bound.precision, found.manner, found.micro_batch, accumulates=found.accumulated > 1
        ).work

    def _explore(self) -> None:
        places = sum(len(self.space.micro_batches[layout.gpus]) for layout in self.space.layouts)
        per_member = len(self.space.manners) * places
        self.counts["cannot_run"] += len(self.pool.refused) * per_member
        bound: list[tuple[EvidenceKey, BoundMember, list[Micro]]] = []
        for precision, members in self.pool.bound.items():
            micros = self._micros(precision, members)
            bound += [(member.evidence(step_in_backward=False), member, micros) for member in members]
        for _, member, micros in sorted(bound, key=lambda entry: entry[0]):
            self._decide(member, micros)
        self.front.sort(key=lambda found: (found.key, found.seconds, found.peak_bytes))

    def _micros(self, precision: str, members: list[BoundMember]) -> list[Micro]:
        """The ways of running a precision that fit beside the smallest of the members' states."""
        if not members:
            return []
        least = min(member.resident_bytes for member in members)
        found: list[Micro] = []
        for manner in self.space.manners:
            for layout in self.space.layouts:
                found += self._fitting(precision, manner, layout, least, len(members))
        return found

    def _fitting(self, precision: str, manner: Manner, layout: Layout, least: int, num_members: int) -> Iterator[Micro]:
        sizes = self.space.micro_batches[layout.gpus]
        reason = self._refusal(precision, manner)
        if reason:
            self.counts["cannot_run"] += num_members * len(sizes)
            return
        for index, size in enumerate(sizes):
            accumulated = 1 if manner.step_in_backward else accumulated_batches(self.space.sequences, layout, size)
            point = self._recorder.point(precision, manner, size, accumulates=accumulated > 1)
            if least + point.least_bytes > self.limit_bytes:
                if index == 0:
                    self._note_least(precision, manner, point)
                self.counts["larger_batch"] += num_members * (len(sizes) - index)
                return
            yield self._micro(precision, manner, layout, size, accumulated, point)

    def _micro(
        self, precision: str, manner: Manner, layout: Layout, size: int, accumulated: int, point: StepPoint
    ) -> Micro:
        forward = phase_busy(point.work.forward, self.gpu, precision, model=self.model)
        busy = forward.plus(phase_busy(point.work.backward, self.gpu, precision, model=self.model)).times(accumulated)
        share = size * accumulated * layout.gpus / self.space.sequences
        return Micro(manner, layout, size, accumulated, share, point, busy)

    def _refusal(self, precision: str, manner: Manner) -> str | None:
        reason = manner_refused(self.base, precision, manner)
        if reason:
            self.refused_manners[precision, manner] = reason
        return reason

    def _note_least(self, precision: str, manner: Manner, point: StepPoint) -> None:
        for member in self.pool.bound[precision]:
            self._lower(member, manner, member.resident_bytes + point.least_bytes)

    def _lower(self, member: BoundMember, manner: Manner, num_bytes: int) -> None:
        self.least_bytes[member] = min(num_bytes, self.least_bytes.get(member, num_bytes))
        if not manner.step_in_backward:
            self.least_usual_bytes[member] = min(num_bytes, self.least_usual_bytes.get(member, num_bytes))

    def _decide(self, member: BoundMember, micros: list[Micro]) -> None:
        resident = member.resident_bytes
        if resident > self.limit_bytes:
            self.counts["resident"] += len(micros)
            for micro in micros:
                self._lower(member, micro.manner, resident + micro.point.least_bytes)
            return
        update = member.busy(self.gpu, self.model)
        keys = {in_backward: member.evidence(step_in_backward=in_backward) for in_backward in (False, True)}
        for micro in micros:
            self._decide_one(member, micro, resident, update, keys[micro.manner.step_in_backward])

    def _decide_one(self, member: BoundMember, micro: Micro, resident: int, update: Busy, key: EvidenceKey) -> None:
        bound = resident + micro.point.least_bytes
        if bound > self.limit_bytes:
            self._lower(member, micro.manner, bound)
            self.counts["memory"] += 1
            return
        seconds = longer(micro.busy.plus(update), self.model.overlap.exponent) / micro.share
        winner = next((found for found in self.front if found.beats(bound, seconds, key)), None)
        peak = bound
        if winner is None:
            temporary = member.parameter_temporary_bytes if micro.manner.step_in_backward else member.temporary_bytes
            peak = resident + micro.point.peak_bytes(temporary)
            if peak > self.limit_bytes:
                self._lower(member, micro.manner, peak)
                self.counts["memory"] += 1
                return
        found = Found(member, micro.manner, micro.layout, micro.micro_batch, micro.accumulated, peak, seconds, key)
        if winner is None:
            winner = next((other for other in self.front if other.beats(peak, seconds, key)), None)
        self._lower(member, micro.manner, peak)
        self._note(found, winner)

    def _note(self, found: Found, winner: Found | None) -> None:
        known = self.best.get(found.bound)
        if known is None or (found.key, found.seconds) < (known.key, known.seconds):
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
