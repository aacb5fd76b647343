"""A recorded step in compressed form: layers that are alike are recorded once and stand for all.

The layers of a decoder are alike, or alike at a fixed period. So a model is recorded with a few of them: the first, one
period from the middle, the last. The timeline of the whole model follows by repeating the middle, and its peaks follow
without writing the timeline out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, get_args

from optplan.planner.allocator.caching import ROUNDING
from optplan.planner.step.graph import Record, Segment
from optplan.planner.step.tape import Tape
from optplan.planner.timeline import Category, Phase, TimelineBuilder

_LAST_LAYERS = 2
"""Layers recorded at the end at least: the one next to the loss, and one whose neighbours are ordinary."""
CATEGORIES: tuple[Category, ...] = get_args(Category)

Place = tuple[Phase, int | None, int]
"""A stretch of the model's step: phase and layer, or the recorded segment where there is no layer."""


class LayerPlan(NamedTuple):
    """Which layers of a model are recorded.

    Attributes:
        first: Recorded layers before those that repeat.
        period: Recorded layers that repeat.
        repeats: How often they occur in the model.
        last: Recorded layers after them.
    """

    first: int
    period: int
    repeats: int
    last: int

    @property
    def skipped(self) -> int:
        """Layers of the model that are not recorded."""
        return self.period * (self.repeats - 1)

    def in_model(self, layer: int) -> int:
        """Number in the model of a recorded layer, the first of those that it stands for."""
        return layer if layer < self.first + self.period else layer + self.skipped

    def repeating(self, layer: int | None) -> bool:
        """Whether a recorded layer stands for several."""
        return layer is not None and self.first <= layer < self.first + self.period

    def recorded_kinds(self, kinds: Sequence[str]) -> tuple[str, ...]:
        """The kinds of the recorded layers, out of those of all layers."""
        return (*kinds[: self.first + self.period], *kinds[len(kinds) - self.last :])


def plan_layers(kinds: Sequence[str]) -> LayerPlan:
    """The layers to record for a model whose layers have these kinds."""
    count = len(kinds)
    period = next(p for p in range(1, count + 1) if kinds[p:] == kinds[: count - p])
    first = 1 + max(kinds.index(kind) for kind in set(kinds))
    repeats = (count - first - _LAST_LAYERS) // period
    if repeats < 2:
        return LayerPlan(0, 0, 1, count)
    return LayerPlan(first, period, repeats, count - first - period * repeats)


def _name(record: Record) -> str:
    return f"{record.path} {record.operation}"


def _write(timeline: TimelineBuilder, record: Record, prefix: str) -> int:
    """Append a recorded allocation, and return its id in the timeline."""
    name = prefix + _name(record)
    return timeline.alloc(record.num_bytes, record.category, name, itemsize=record.itemsize, stream=record.stream)


class PhaseUse(NamedTuple):
    """Bytes in use, rounded as the allocator rounds them, relative to the start of a stretch.

    Attributes:
        peak: Bytes by category at the peak.
        end: Bytes by category at the end; negative where more is freed than allocated.
    """

    peak: tuple[int, ...]
    end: tuple[int, ...]


class Program:
    """A recorded forward and backward.

    Attributes:
        tape: The record.
        plan: How the recorded layers stand for the model's.
        layer_name: From a layer's number to its dotted name.
    """

    def __init__(self, tape: Tape, plan: LayerPlan, layer_name: Callable[[int], str]) -> None:
        self.tape = tape
        self.plan = plan
        self.layer_name = layer_name
        self._ends = [*tape.segments[1:], Segment("backward", None, len(tape.events), len(tape.records) + 1)]

    def stretches(self) -> Iterator[tuple[int, int]]:
        """The recorded segments as they follow in the model, and how many layers later than recorded each comes."""
        plan, segments = self.plan, self.tape.segments
        index = 0
        while index < len(segments):
            layer = segments[index].layer
            if plan.repeating(layer):
                order = range(plan.repeats) if segments[index].phase == "forward" else reversed(range(plan.repeats))
                for repeat in order:
                    yield from ((index + offset, plan.period * repeat) for offset in range(plan.period))
                index += plan.period
                continue
            # What is outside the layers, between their forward and backward, has the last layers for neighbours.
            behind = 0 < index < len(segments) - 1 if layer is None else layer >= plan.first
            yield index, plan.skipped if behind else 0
            index += 1

    def write(self, timeline: TimelineBuilder) -> dict[str, int]:
        """Append the whole model's forward and backward to a timeline.

        Returns:
            The ids of the gradients made, by the parameters' names.
        """
        ids: dict[Place, list[int]] = {}
        owner = self._owners()
        for index, shift in self.stretches():
            timeline.phase = self.tape.segments[index].phase
            made = ids.setdefault(self._place(index, shift), [])
            prefix = self._prefix(index, shift)
            for event in self._events(index):
                if event > 0:
                    record = self.tape.records[event - 1]
                    made.append(_write(timeline, record, prefix))
                else:
                    segment, position = owner[-event]
                    for place in self._places_of(segment, index, shift):
                        timeline.free(ids[place][position])
        return self._gradient_ids(ids, owner)

    def _events(self, index: int) -> list[int]:
        return self.tape.events[self.tape.segments[index].first_event : self._ends[index].first_event]

    def _place(self, index: int, shift: int) -> Place:
        phase, layer = self.tape.segments[index][:2]
        return (phase, None, index) if layer is None else (phase, layer + shift, 0)

    def _places_of(self, segment: int, user: int, shift: int) -> list[Place]:
        """Where in the model the memory lies that a stretch frees: what outlives the layers, in each of them."""
        layers = self.tape.segments
        if layers[user].layer is None and self.plan.repeating(layers[segment].layer):
            return [self._place(segment, self.plan.period * repeat) for repeat in range(self.plan.repeats)]
        return [self._place(segment, self._shift_of(segment, user, shift))]

    def _shift_of(self, segment: int, user: int, shift: int) -> int:
        if self.tape.segments[user].layer is not None:
            return shift
        layer = self.tape.segments[segment].layer
        return 0 if layer is None else self._tail_shift(layer)

    def _prefix(self, index: int, shift: int) -> str:
        layer = self.tape.segments[index].layer
        return "" if layer is None else self.layer_name(layer + shift) + "."

    def _owners(self) -> list[tuple[int, int]]:
        """The segment in which each recorded allocation was made, and its position there; by id."""
        owner = [(0, 0)]
        for index, segment in enumerate(self.tape.segments):
            owner += [(index, position) for position in range(self._ends[index].first_id - segment.first_id)]
        return owner

    def _gradient_ids(self, ids: dict[Place, list[int]], owner: list[tuple[int, int]]) -> dict[str, int]:
        gradients: dict[str, int] = {}
        for (layer, name), id_ in self.tape.gradients.items():
            segment, position = owner[id_]
            if layer is None:
                gradients[name] = ids[self._place(segment, 0)][position]
                continue
            repeats = range(self.plan.repeats) if self.plan.repeating(layer) else (0,)
            for repeat in repeats:
                shift = self.plan.period * repeat if self.plan.repeating(layer) else self._tail_shift(layer)
                full_name = f"{self.layer_name(layer + shift)}.{name}"
                gradients[full_name] = ids[self._place(segment, shift)][position]
        return gradients

    def _tail_shift(self, layer: int) -> int:
        return self.plan.skipped if layer >= self.plan.first else 0

    def use(self) -> dict[Phase, PhaseUse]:
        """Peak and end of forward and backward, each relative to the start of the forward."""
        uses = [self._segment_use(index) for index in range(len(self.tape.segments))]
        base = [0] * len(CATEGORIES)
        result: dict[Phase, PhaseUse] = {}
        for index, _ in self.stretches():
            phase, use = self.tape.segments[index].phase, uses[index]
            peak = tuple(map(int.__add__, base, use.peak))
            base = list(map(int.__add__, base, use.end))
            if phase not in result or sum(peak) > sum(result[phase].peak):
                result[phase] = PhaseUse(peak, tuple(base))
            result[phase] = PhaseUse(result[phase].peak, tuple(base))
        return result

    def _segment_use(self, index: int) -> PhaseUse:
        in_use = [0] * len(CATEGORIES)
        total = highest = 0
        peak = tuple(in_use)
        outside = self.tape.segments[index].layer is None
        for event in self._events(index):
            record = self.tape.records[abs(event) - 1]
            size = -(-record.num_bytes // ROUNDING) * ROUNDING
            signed = size if event > 0 else -size
            if outside and self.plan.repeating(record.layer):
                signed *= self.plan.repeats
            in_use[CATEGORIES.index(record.category)] += signed
            total += signed
            if total > highest:
                highest, peak = total, tuple(in_use)
        return PhaseUse(peak, tuple(in_use))
