"""The first steps of a training run through torch's caching allocator: allocated and reserved bytes of a steady step.

What an allocation occupies depends on what came before it, so the run is simulated from the empty device: the model is
loaded, the first step creates the optimizer's state, and the second step is measured; a third changes next to nothing.
What all optimizers share is simulated once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from optplan.planner.allocator_choice import copy_of, make_allocator
from optplan.planner.allocator_settings import AllocatorSettings
from optplan.planner.models.spec import ModelSpec
from optplan.planner.step.clipping import write_clipping
from optplan.planner.step.options import StepOptions
from optplan.planner.step.resident import write_load
from optplan.planner.step.rules import write_forward_backward
from optplan.planner.timeline import Allocation, Category, Phase, Timeline, TimelineBuilder

_KEPT = 0
"""Id of an allocation that stays for the rest of the run."""

_PRODUCTS = (
    "proj output", "c_attn output", "query_key_value output", "query output", "SelfAttention.q output",
    "weight gradient",
)  # fmt: skip
"""Operations that run a matrix product, the first of which in a phase makes its thread's library workspaces."""


class _Event(NamedTuple):
    """An allocation with its bytes and name, or with the negative id its end; the category is the memory's in both."""

    id: int
    num_bytes: int
    category: Category
    phase: Phase
    name: str


class SimulatedStep(msgspec.Struct, frozen=True):
    """A steady step on a device with room for all it asks.

    Attributes:
        phases: Largest number of allocated bytes in forward, backward and step, and in clip if gradients are clipped.
        categories: Allocated bytes by category at the largest of them.
        reserved_bytes: Largest number of bytes held from the driver, cached blocks included.
    """

    phases: dict[Phase, int]
    categories: dict[Category, int]
    reserved_bytes: int

    @property
    def peak_phase(self) -> Phase:
        """The phase with the largest peak, of equal ones the earliest."""
        return max(self.phases, key=lambda phase: self.phases[phase])


class ParameterStep(NamedTuple):
    """The part of an optimizer's work that belongs to one parameter.

    Attributes:
        state_bytes: Bytes of its state tensors on the device.
        timeline: What its `step()` allocates and frees.
    """

    state_bytes: Sequence[int]
    timeline: Timeline


class StepSimulator:
    """Simulates a model's steps under one set of options, for one optimizer after another."""

    def __init__(
        self,
        spec: ModelSpec,
        options: StepOptions,
        *,
        master_bytes: Sequence[int] = (),
        clips: bool = False,
        empties_cache: bool = False,
        settings: AllocatorSettings = AllocatorSettings(),  # noqa: B008
    ) -> None:
        """Prepare what the optimizers share.

        Args:
            spec: The model.
            options: How the step is run.
            master_bytes: Bytes of each parameter's master weight, empty if there are none.
            clips: Whether the gradients' norm is clipped before the optimizer's step.
            empties_cache: Whether the cached blocks are given back after every step.
            settings: Those of torch's allocator.
        """
        self._options, self._empties_cache = options, empties_cache
        self._workspaces: list[Allocation] = []
        self._start = _Device(settings)
        self._load(spec, master_bytes)
        self._first, self._gradients = _micro_step(spec, options, has_gradients=False)
        self._last = _micro_step(spec, options, has_gradients=True)[0] if options.has_gradients else []
        self._clip = _clip_events(spec, options) if clips else []
        if not options.step_in_backward:
            # Until its first step() no optimizer has allocated anything, so that all start from here.
            self._run_first_step()

    def _load(self, spec: ModelSpec, master_bytes: Sequence[int]) -> None:
        load = TimelineBuilder()
        write_load(load, spec, self._options)
        for num_bytes in master_bytes:
            load.alloc(num_bytes, "master_weights", "master weight")
        for event in load.events:
            assert isinstance(event, Allocation)
            if event.category == "workspace":
                self._workspaces.append(event)
            else:
                self._start.keep(event.bytes, event.category)

    def _run_first_step(self) -> None:
        self._start.run(_with_workspaces(self._first, self._workspaces))
        self._start.set_aside()
        for _ in range(min(self._options.grad_accum - 1, 1)):
            self._start.run(self._last)
            self._start.set_aside()
        self._start.run(self._clip)

    def simulate(self, state_bytes: Sequence[int], step: Timeline) -> SimulatedStep:
        """The steady step with one optimizer.

        Args:
            state_bytes: Bytes of its state tensors on the device, in the order in which the first step makes them.
            step: What its `step()` allocates and frees.
        """
        device, optimizer = self._start.copy(), _events(step)
        for num_bytes in state_bytes:
            device.keep(num_bytes, "optimizer_state")
        device.run(optimizer)
        if not self._options.keep_grads:
            device.clear()
        if self._empties_cache:
            device.empty_cache()
        if self._options.grad_accum > 1:
            device.run(self._last if self._options.keep_grads else self._first)
            device.set_aside()
        device.measure(self._last or self._first, "forward", "backward")
        device.set_aside()
        if self._clip:
            device.measure(self._clip, "clip")
        device.measure(optimizer, "step")
        return device.result()

    def simulate_in_backward(self, steps: Mapping[str, ParameterStep]) -> SimulatedStep:
        """The steady step with an optimizer that takes each parameter's step when its gradient is there.

        Args:
            steps: What each parameter's step takes, by the parameter's name.
        """
        device = self._start.copy()
        first = _with_workspaces(self._first, self._workspaces)
        device.run(_with_steps(first, self._gradients, steps, makes_state=True))
        if self._empties_cache:
            device.empty_cache()
        device.measure(_with_steps(self._first, self._gradients, steps), "forward", "backward")
        device.measure([], "step")
        return device.result()


def _micro_step(spec: ModelSpec, options: StepOptions, *, has_gradients: bool) -> tuple[list[_Event], dict[str, int]]:
    """Forward and backward of a micro-step that makes the gradients or adds to them, and the gradients' ids by name."""
    timeline = TimelineBuilder("load")
    options = msgspec.structs.replace(options, grad_accum=2 if has_gradients else 1, keep_grads=False)
    gradients = write_forward_backward(timeline, spec, options)
    return _events([event for event in timeline.events if event.phase != "load"]), gradients


def _clip_events(spec: ModelSpec, options: StepOptions) -> list[_Event]:
    timeline = TimelineBuilder("clip")
    write_clipping(timeline, spec.unique_parameters, dtype=options.parameter_dtype)
    return _events(timeline.events)


def _with_steps(
    events: Sequence[_Event],
    gradients: Mapping[str, int],
    steps: Mapping[str, ParameterStep],
    *,
    makes_state: bool = False,
) -> list[_Event]:
    """The events of a micro-step with each parameter's step right before its gradient's end."""
    owner = {-id_: name for name, id_ in gradients.items()}
    last_id = max(event.id for event in events)
    result = []
    for event in events:
        if event.id in owner:
            step = steps[owner[event.id]]
            if makes_state:
                result += [_Event(_KEPT, size, "optimizer_state", "backward", "") for size in step.state_bytes]
            inner = _events(step.timeline)
            result += [e._replace(id=e.id + (last_id if e.id > 0 else -last_id), phase="backward") for e in inner]
        result.append(event)
    return result


def _events(timeline: Timeline) -> list[_Event]:
    made: dict[int, tuple[Category, str]] = {}
    events = []
    for event in timeline:
        if isinstance(event, Allocation):
            made[event.id] = event.category, event.name
            events.append(_Event(event.id, event.bytes, event.category, event.phase, event.name))
        else:
            events.append(_Event(-event.id, 0, made[event.id][0], event.phase, ""))
    return events


def _with_workspaces(events: Sequence[_Event], workspaces: Sequence[Allocation]) -> list[_Event]:
    """The events of the very first micro-step, in which each thread's first product makes its workspaces."""
    waiting, result = list(workspaces), []
    for event in events:
        result.append(event)
        if waiting and event.name.endswith(_PRODUCTS):
            made = [workspace for workspace in waiting if workspace.name.endswith(event.phase)]
            result += [_Event(_KEPT, workspace.bytes, "workspace", event.phase, "") for workspace in made]
            waiting = [workspace for workspace in waiting if workspace not in made]
    return result + [_Event(_KEPT, workspace.bytes, "workspace", "backward", "") for workspace in waiting]


class _Device:
    """An allocator and the memory of one run: what is kept for good, and what the current step has allocated."""

    def __init__(self, settings: AllocatorSettings) -> None:
        self._settings = settings
        self._allocator = make_allocator(settings)
        self._kept: dict[Category, int] = {}
        self._blocks: dict[int, Any] = {}
        self._gradients: list[Any] = []
        self._phases: dict[Phase, int] = {}
        self._categories: dict[Category, int] = {}
        self._reserved_before_flush = 0

    def copy(self) -> _Device:
        """A device in the same state, between two parts of a step."""
        other = _Device(self._settings)
        other._allocator, twins = copy_of(self._allocator, filter(None, self._gradients))
        other._kept = dict(self._kept)
        other._gradients = [block and twins[block] for block in self._gradients]
        return other

    def empty_cache(self) -> None:
        """Give back the cached segments."""
        self._reserved_before_flush = max(self._reserved_before_flush, self._allocator.reserved_bytes)
        self._allocator.empty_cache()

    def keep(self, num_bytes: int, category: Category) -> None:
        """Allocate for the rest of the run."""
        block = self._allocator.alloc(num_bytes)
        self._kept[category] = self._kept.get(category, 0) + (block.size if block else 0)

    def set_aside(self) -> None:
        """Keep the gradients, all that a micro-step leaves, to the end of the step; the ids to come may be the same."""
        self._gradients += self._blocks.values()
        self._blocks.clear()

    def clear(self) -> None:
        """Free the gradients, first the parameter's whose gradient came last."""
        for block in reversed(self._gradients):
            self._allocator.free(block)
        self._gradients.clear()

    def run(self, events: Sequence[_Event]) -> None:
        """Run events."""
        blocks, alloc, free = self._blocks, self._allocator.alloc, self._allocator.free
        for id_, num_bytes, category, _, _ in events:
            if id_ > 0:
                blocks[id_] = alloc(num_bytes)
            elif id_ < 0:
                free(blocks.pop(-id_))
            else:
                self.keep(num_bytes, category)

    def measure(self, events: Sequence[_Event], *phases: Phase) -> None:
        """Run the events of these phases and note their peaks; the first begins with what is alive now."""
        allocator, blocks = self._allocator, self._blocks
        alloc, free = allocator.alloc, allocator.free
        in_use = self._in_use()
        history = [allocator.allocated_bytes]
        for id_, num_bytes, _, _, _ in events:
            if id_ > 0:
                blocks[id_] = alloc(num_bytes)
            else:
                free(blocks.pop(-id_))
            history.append(allocator.allocated_bytes)
        self._note(events, phases, history, in_use)

    def _note(
        self, events: Sequence[_Event], phases: Sequence[Phase], history: list[int], in_use: dict[Category, int]
    ) -> None:
        before = max(self._phases.values(), default=-1)
        start = 0
        for phase in phases:
            length = sum(event.phase == phase for event in events)
            # A phase begins with what the one before it has left.
            self._phases[phase] = max(history[start : start + length + 1])
            start += length
        if max(history) > before:
            at_peak = history.index(max(history))
            for index, event in enumerate(events[:at_peak]):
                in_use[event.category] = in_use.get(event.category, 0) + history[index + 1] - history[index]
            self._categories = in_use

    def _in_use(self) -> dict[Category, int]:
        gradients = sum(block.size for block in self._gradients if block is not None)
        return {**self._kept, "gradients": gradients}

    def result(self) -> SimulatedStep:
        """What the measured step held."""
        categories = {category: size for category, size in self._categories.items() if size}
        reserved_bytes = max(self._reserved_before_flush, self._allocator.reserved_bytes)
        return SimulatedStep(self._phases, categories, reserved_bytes)
