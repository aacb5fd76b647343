"""A recorded step in compressed form: layers that are alike are recorded once and stand for all.

The layers of a stack (a decoder, or T5's encoder and its decoder) are alike, or alike at a fixed period. So a model is
recorded with a few of each stack's: the first, one period from the middle, the last. The timeline of the whole model
follows by repeating the middle, and its peaks follow without writing the timeline out.
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
    """Which layers of a stack are recorded.

    Attributes:
        first: Recorded layers before those that repeat.
        period: Recorded layers that repeat.
        repeats: How often they occur in the stack.
        last: Recorded layers after them.
    """

    first: int
    period: int
    repeats: int
    last: int

    @property
    def num_layers(self) -> int:
        """Layers of the stack."""
        return self.first + self.period * self.repeats + self.last

    def recorded(self, before: int) -> list[RecordedLayer]:
        """The recorded layers of a stack that has `before` layers of the model before it."""
        middle, end = before + self.first, before + self.num_layers
        return [
            *(RecordedLayer(layer, 0, 1) for layer in range(before, middle)),
            *(RecordedLayer(layer, self.period, self.repeats) for layer in range(middle, middle + self.period)),
            *(RecordedLayer(layer, 0, 1) for layer in range(end - self.last, end)),
        ]


class RecordedLayer(NamedTuple):
    """A recorded layer and those that it stands for.

    Attributes:
        number: The first of them in the model.
        period: From one of them to the next, 0 if it is the only one.
        repeats: How many they are.
    """

    number: int
    period: int
    repeats: int


def plan_layers(kinds: Sequence[str], *, least_first: int = 1) -> LayerPlan:
    """The layers to record for a stack whose layers have these kinds, at least `least_first` at its beginning."""
    count = len(kinds)
    period = next(p for p in range(1, count + 1) if kinds[p:] == kinds[: count - p])
    first = max(least_first, 1 + max(kinds.index(kind) for kind in set(kinds)))
    repeats = (count - first - _LAST_LAYERS) // period
    if repeats < 2:
        return whole_stack(count)
    return LayerPlan(first, period, repeats, count - first - period * repeats)


def whole_stack(count: int) -> LayerPlan:
    """The plan that records every layer."""
    return LayerPlan(count, 0, 1, 0)


def recorded_layers(plans: Sequence[LayerPlan]) -> list[RecordedLayer]:
    """The recorded layers of stacks that follow one another."""
    layers: list[RecordedLayer] = []
    before = 0
    for plan in plans:
        layers += plan.recorded(before)
        before += plan.num_layers
    return layers


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
        layers: Which of the model's layers each recorded one stands for.
        layer_name: From a layer's number to its dotted name.
    """

    def __init__(self, tape: Tape, layers: Sequence[RecordedLayer], layer_name: Callable[[int], str]) -> None:
        self.tape = tape
        self.layers = layers
        self.layer_name = layer_name
        self._ends = [*tape.segments[1:], Segment("backward", None, len(tape.events), len(tape.records) + 1)]

    def stretches(self) -> Iterator[tuple[int, int]]:
        """The recorded segments as they follow in the model, and how many layers later than recorded each comes."""
        segments = self.tape.segments
        index = 0
        while index < len(segments):
            phase, layer = segments[index][:2]
            period, repeats = (0, 1) if layer is None else self.layers[layer][1:]
            order = range(repeats) if phase == "forward" else reversed(range(repeats))
            length = period or 1
            for repeat in order:
                yield from ((at, self._shift(segments[at].layer, repeat)) for at in range(index, index + length))
            index += length

    def _shift(self, layer: int | None, repeat: int) -> int:
        """How many layers later than recorded one comes that a recorded layer stands for; 0 outside the layers."""
        if layer is None:
            return 0
        number, period, _ = self.layers[layer]
        return number - layer + period * repeat

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
        layer, at = self.tape.segments[segment].layer, self.tape.segments[user].layer
        if layer is None:
            return [self._place(segment, 0)]
        if at is not None and self._are_near(layer, at):
            return [self._place(segment, shift)]
        return [self._place(segment, self._shift(layer, repeat)) for repeat in range(self.layers[layer].repeats)]

    def _are_near(self, layer: int, other: int) -> bool:
        """Whether two recorded layers stand for layers that are as near to one another each time."""
        return abs(layer - other) <= max(1, self.layers[layer].period, self.layers[other].period)

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
            for repeat in range(self.layers[layer].repeats):
                shift = self._shift(layer, repeat)
                full_name = f"{self.layer_name(layer + shift)}.{name}"
                gradients[full_name] = ids[self._place(segment, shift)][position]
        return gradients

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
            if outside and record.layer is not None:
                signed *= self.layers[record.layer].repeats
            in_use[CATEGORIES.index(record.category)] += signed
            total += signed
            if total > highest:
                highest, peak = total, tuple(in_use)
        return PhaseUse(peak, tuple(in_use))
