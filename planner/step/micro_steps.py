"""Forward and backward of a step's micro-batches, recorded once for all that simulates them."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from optplan.planner.models.spec import ModelSpec
from optplan.planner.sharding.base import Strategy
from optplan.planner.step.options import StepOptions
from optplan.planner.step.rules import write_forward_backward
from optplan.planner.step.simulated_device import SimulatedEvent
from optplan.planner.timeline import Allocation, Category, Timeline, TimelineBuilder


class MicroSteps(NamedTuple):
    """The events of a step's micro-steps, as recorded.

    Attributes:
        first: The micro-step that makes the gradients.
        last: One that adds to them, empty if none does.
        gradients: The ids of the gradients that the first makes, by the parameter's name.
    """

    first: list[SimulatedEvent]
    last: list[SimulatedEvent]
    gradients: dict[str, int]


def record_micro_steps(spec: ModelSpec, options: StepOptions, strategy: Strategy | None) -> MicroSteps:
    """The micro-steps that a step consists of."""
    first, gradients = _micro_step(spec, options, strategy, has_gradients=False)
    last = _micro_step(spec, options, strategy, has_gradients=True)[0] if options.has_gradients else []
    return MicroSteps(first, last, gradients)


def _micro_step(
    spec: ModelSpec, options: StepOptions, strategy: Strategy | None, *, has_gradients: bool
) -> tuple[list[SimulatedEvent], dict[str, int]]:
    """Forward and backward of a micro-step that makes the gradients or adds to them, and the gradients' ids by name."""
    timeline = TimelineBuilder("load")
    options = msgspec.structs.replace(options, grad_accum=2 if has_gradients else 1, keep_grads=False)
    gradients = write_forward_backward(timeline, spec, options, strategy)
    return simulated_events([event for event in timeline.events if event.phase != "load"]), gradients


def simulated_events(timeline: Timeline) -> list[SimulatedEvent]:
    """A timeline as a simulated device takes it."""
    made: dict[int, Category] = {}
    events: list[SimulatedEvent] = []
    # Half the time of `SimulatedEvent(...)`, and there are tens of thousands.
    new, add = tuple.__new__, events.append
    for event in timeline:
        id_ = event.id
        if isinstance(event, Allocation):
            made[id_] = category = event.category
            add(new(SimulatedEvent, (id_, event.bytes, category, event.phase, event.name, event.stream)))
        else:
            add(new(SimulatedEvent, (-id_, 0, made[id_], event.phase, "", 0)))
    return events
