"""The first steps of a training run through torch's caching allocator: allocated and reserved bytes of a steady step.

What an allocation occupies depends on what came before it, so the run is simulated from the empty device: the model is
loaded, the first step creates the optimizer's state, and the second step is measured, or the third where steps are
short: which blocks are cut has settled by then. What all optimizers share is simulated once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice, repeat, takewhile
from typing import NamedTuple

import msgspec

from optplan.planner.allocator.settings import AllocatorSettings
from optplan.planner.models.spec import ModelSpec
from optplan.planner.sharding.base import Resident, Strategy
from optplan.planner.step.clipping import write_clipping
from optplan.planner.step.micro_steps import MicroSteps, record_micro_steps, simulated_events
from optplan.planner.step.optimizer_step import COPIED
from optplan.planner.step.options import StepOptions
from optplan.planner.step.resident import added_biases, write_load
from optplan.planner.step.simulated_device import KEPT, SimulatedDevice, SimulatedEvent, SimulatedStep
from optplan.planner.step.view import model_view
from optplan.planner.step_history import StepHistory
from optplan.planner.timeline import Allocation, Event, Timeline, TimelineBuilder

_PRODUCTS = (
    "rotary_emb angles", "project_in output", "proj output", "c_attn output", "query_key_value output", "query output",
    "SelfAttention.q output", "weight gradient", "gradient of the input",
)  # fmt: skip
"""Operations that run a matrix product, the first of which in a phase makes its thread's library workspaces."""
_FEW_EVENTS = 8500
"""Events up to which the second step is run before one is measured: it moves some MiB, T5-base's under amp the most."""


class ParameterStep(NamedTuple):
    """The part of an optimizer's work that belongs to one parameter.

    Attributes:
        state_bytes: Bytes of its state tensors on the device.
        timeline: What its `step()` allocates and frees.
    """

    state_bytes: Sequence[int]
    timeline: Timeline


class StepSimulator:
    """Simulates a model's steps under one set of options, for one optimizer after another.

    Attributes:
        num_steps_taken: Whole steps that the last `take_steps` has come through.
        num_flushes: How often the allocator gave back its cache for a request in the last whole one of these.
    """

    def __init__(
        self,
        spec: ModelSpec,
        options: StepOptions,
        *,
        master_bytes: Sequence[int] = (),
        clips: bool = False,
        clip_foreach: bool = True,
        empties_cache: bool = False,
        settings: AllocatorSettings = AllocatorSettings(),  # noqa: B008
        strategy: Strategy | None = None,
        cached: Sequence[int] = (),
        num_in_flight: int = 1,
        allowed_bytes: int | None = None,
        recorded: MicroSteps | None = None,
    ) -> None:
        """Prepare what the optimizers share.

        Args:
            spec: The model.
            options: How the step is run.
            master_bytes: Bytes of each parameter's master weight, empty if there are none.
            clips: Whether the gradients' norm is clipped before the optimizer's step.
            clip_foreach: Whether the gradients' norms are taken in one kernel, torch's default on CUDA.
            empties_cache: Whether the cached blocks are given back after every step.
            settings: Those of torch's allocator.
            strategy: How the work is divided among GPUs, if it is.
            num_in_flight: Micro-batches whose forward has been run when the one described runs backward, it included.
            cached: Bytes of what the process had allocated, in this order, and freed before the model is loaded.
            allowed_bytes: Most bytes that the allocator may hold from the driver, None for a device without end.
            recorded: The micro-steps, if they have been recorded.

        Raises:
            OutOfMemory: The first step needs more than the allocator may hold.
        """
        self._options, self._empties_cache = options, empties_cache
        self._strategy = strategy
        self._kept, self._replaced = ([], []) if strategy is None else _kept(spec, options, strategy)
        self._workspaces: list[Allocation] = []
        self.num_steps_taken = self.num_flushes = 0
        self._biased = frozenset(f"{name.removesuffix('.bias')} output" for name in added_biases(spec))
        self._start = SimulatedDevice(settings, allowed_bytes=allowed_bytes)
        self._start.run(_freed(cached))
        self._load(spec, master_bytes)
        self._first, self._last, self._gradients = recorded or record_micro_steps(spec, options, strategy)
        self._waiting = _saved(self._first) * (num_in_flight - 1)
        self._clip = _clip_events(spec, options, foreach=clip_foreach) if clips else []
        if not options.step_in_backward:
            # Until its first step() no optimizer has allocated anything, so that all start from here.
            self._run_first_step()

    def _load(self, spec: ModelSpec, master_bytes: Sequence[int]) -> None:
        load = TimelineBuilder()
        write_load(load, spec, self._options, self._strategy)
        events, view = iter(load.events), model_view(spec, self._options)
        for count, whole in () if self._strategy is None else self._strategy.divided(view):
            self._start.hold(("whole parameter", num_bytes, "parameters") for num_bytes in whole)
            self._place(islice(events, count))
            self._start.free_held(len(whole))
        self._place(events)
        self._start.pass_through(() if self._strategy is None else self._strategy.passing(view))
        self._start.hold(self._replaced or self._kept)
        for num_bytes in master_bytes:
            self._start.keep(num_bytes, "master_weights", "master weight")

    def _place(self, events: Iterable[Event]) -> None:
        for event in events:
            assert isinstance(event, Allocation)
            if event.category == "workspace":
                self._workspaces.append(event)
            else:
                self._start.keep(event.bytes, event.category, event.name)

    def _very_first(self) -> list[SimulatedEvent]:
        """The first micro-step of all, in which each thread makes its libraries' workspaces."""
        return _with_workspaces(self._first, self._workspaces, self._biased)

    def _run_first_step(self) -> None:
        self._start.run(self._very_first())
        self._start.set_aside()
        for _ in range(min(self._options.grad_accum - 1, 1)):
            self._start.run(self._last)
            self._start.set_aside()
        self._start.run(self._clip)

    @property
    def num_events(self) -> int:
        """Events of the micro-steps: the first of a step, and where there is another, the last."""
        return len(self._first) + len(self._last)

    def simulate(self, state_bytes: Sequence[int], step: Timeline) -> SimulatedStep:
        """The steady step with one optimizer.

        Args:
            state_bytes: Bytes of its state tensors on the device, in the order in which the first step makes them.
            step: What its `step()` allocates and frees.
        """
        result = self._steady(state_bytes, step).result()
        if not self._replaced:
            return result
        other = self._steady(state_bytes, step, keeps_replaced=True).result().reserved_bytes
        ends = (min(result.reserved_bytes, other), max(result.reserved_bytes, other))
        return msgspec.structs.replace(result, reserved_range_bytes=ends)

    def history(self, state_bytes: Sequence[int], step: Timeline, *, names: Sequence[str] = ()) -> StepHistory:
        """The same step event by event; `names` are those of the state tensors."""
        return self._steady(state_bytes, step, names).history()

    def _steady(
        self, state_bytes: Sequence[int], step: Timeline, names: Sequence[str] = (), *, keeps_replaced: bool = False
    ) -> SimulatedDevice:
        """A device that has taken the first step, perhaps the second, and measured the next.

        Args:
            state_bytes: Bytes of the optimizer's state tensors.
            step: What its `step()` allocates and frees.
            names: Of the state tensors.
            keeps_replaced: Whether what the second step replaces lives until its backward is over.
        """
        optimizer = simulated_events(step)
        device = self._after_first_step(state_bytes, optimizer, names)
        if self._replaced or self.num_events <= _FEW_EVENTS:
            self._run_step(device, optimizer, replaces=bool(self._replaced), keeps_replaced=keeps_replaced)
        if self._options.grad_accum > 1:
            device.run(self._last if self._options.keep_grads else self._first)
            device.set_aside()
        device.hold(self._waiting)
        device.measure(self._last or self._first, "forward", "backward")
        device.set_aside()
        if self._waiting:
            device.free_last(len(self._waiting))
        if self._clip:
            device.measure(self._clip, "clip")
        device.measure(optimizer, "step")
        return device

    def _after_first_step(
        self, state_bytes: Sequence[int], optimizer: Sequence[SimulatedEvent], names: Sequence[str] = ()
    ) -> SimulatedDevice:
        device = self._start.copy()
        copies = list(takewhile(lambda event: event.name.startswith(COPIED), optimizer))
        device.run(copies)
        for num_bytes, name in zip(state_bytes, names or repeat("state"), strict=False):
            device.keep(num_bytes, "optimizer_state", name)
        device.run(optimizer[len(copies) :])
        self._end_step(device)
        return device

    def take_steps(self, state_bytes: Sequence[int], step: Timeline, *, num_steps: int) -> None:
        """Take whole steps from the empty device on; the arguments are those of `simulate`.

        A step that leaves the cache as the one before it did is the last: all others would do the same.

        Raises:
            OutOfMemory: One of them needs more than the allocator may hold.
        """
        optimizer = simulated_events(step)
        self.num_steps_taken = self.num_flushes = 0
        device, before = self._after_first_step(state_bytes, optimizer), None
        for number in range(1, num_steps):
            self.num_steps_taken = number
            replaces, flushed = bool(self._replaced) and number == 1, device.num_flushes
            self._run_step(device, optimizer, replaces=replaces, keeps_replaced=replaces)
            self.num_flushes = device.num_flushes - flushed
            layout = None if replaces else device.cached_layout
            if layout is not None and layout == before:
                return
            before = layout

    def _end_step(self, device: SimulatedDevice) -> None:
        if not self._options.keep_grads:
            device.clear()
        if self._empties_cache:
            device.empty_cache()

    def _run_step(
        self, device: SimulatedDevice, optimizer: Sequence[SimulatedEvent], *, replaces: bool, keeps_replaced: bool
    ) -> None:
        """A whole step after the first; in the second the strategy replaces what it has kept so far, if anything."""
        if self._options.grad_accum > 1:
            device.run(self._last if self._options.keep_grads else self._first)
            device.set_aside()
        if replaces and not keeps_replaced:
            device.free_held(len(self._replaced))
        if replaces:
            device.hold(self._kept)
        device.hold(self._waiting)
        device.run(self._last or self._first)
        device.set_aside()
        device.free_last(len(self._waiting))
        if replaces and keeps_replaced:
            device.free_held(len(self._replaced))
        device.run([*self._clip, *optimizer])
        self._end_step(device)

    def simulate_in_backward(self, steps: Mapping[str, ParameterStep]) -> SimulatedStep:
        """The steady step with an optimizer that takes each parameter's step when its gradient is there.

        Args:
            steps: What each parameter's step takes, by the parameter's name.
        """
        return self._steady_in_backward(steps).result()

    def history_in_backward(self, steps: Mapping[str, ParameterStep]) -> StepHistory:
        """The same step event by event."""
        return self._steady_in_backward(steps).history()

    def _steady_in_backward(self, steps: Mapping[str, ParameterStep]) -> SimulatedDevice:
        device = self._start.copy()
        first = self._very_first()
        device.run(_with_steps(first, self._gradients, steps, makes_state=True))
        if self._empties_cache:
            device.empty_cache()
        steady = _with_steps(self._first, self._gradients, steps)
        if len(steady) <= _FEW_EVENTS:
            device.run(steady)
            if self._empties_cache:
                device.empty_cache()
        device.measure(steady, "forward", "backward")
        device.measure([], "step")
        return device


def _saved(events: Sequence[SimulatedEvent]) -> list[Resident]:
    """What a micro-batch's forward leaves for its backward."""
    alive: dict[int, SimulatedEvent] = {}
    for event in events:
        if event.phase != "forward":
            break
        if event.id > 0:
            alive[event.id] = event
        else:
            del alive[-event.id]
    return [(f"waiting: {event.name}", event.num_bytes, event.category) for event in alive.values()]


def _freed(sizes: Sequence[int]) -> list[SimulatedEvent]:
    """Allocations of these sizes, and then their ends."""
    made = [SimulatedEvent(id_, size, "unexplained", "load", "freed") for id_, size in enumerate(sizes, start=1)]
    return made + [event._replace(id=-event.id) for event in made]


def _kept(spec: ModelSpec, options: StepOptions, strategy: Strategy) -> tuple[list[Resident], list[Resident]]:
    """What the strategy keeps, and what it has in its place until the second step, if anything."""
    view = model_view(spec, options)
    return list(strategy.kept(view)), list(strategy.replaced(view))


def _clip_events(spec: ModelSpec, options: StepOptions, *, foreach: bool) -> list[SimulatedEvent]:
    timeline = TimelineBuilder("clip")
    write_clipping(
        timeline,
        spec.trained_parameters,
        dtype=options.parameter_dtype,
        foreach=foreach,
        resident_threads=options.resident_threads,
    )
    return simulated_events(timeline.events)


def _with_steps(
    events: Sequence[SimulatedEvent],
    gradients: Mapping[str, int],
    steps: Mapping[str, ParameterStep],
    *,
    makes_state: bool = False,
) -> list[SimulatedEvent]:
    """The events of a micro-step with each parameter's step right before its gradient's end."""
    owner = {-id_: name for name, id_ in gradients.items()}
    last_id = max(event.id for event in events)
    result = []
    for event in events:
        if event.id in owner:
            step = steps[owner[event.id]]
            if makes_state:
                name = f"state of {owner[event.id]}"
                result += [SimulatedEvent(KEPT, size, "optimizer_state", "backward", name) for size in step.state_bytes]
            inner = simulated_events(step.timeline)
            result += [e._replace(id=e.id + (last_id if e.id > 0 else -last_id), phase="backward") for e in inner]
        result.append(event)
    return result


def _with_workspaces(
    events: Sequence[SimulatedEvent], workspaces: Sequence[Allocation], biased: frozenset[str]
) -> list[SimulatedEvent]:
    """The events of the very first micro-step, with a workspace after each thread's first product and first bias."""
    waiting, result = list(workspaces), []
    for event in events:
        result.append(event)
        if waiting and (event.name.endswith(_PRODUCTS) or event.name in biased):
            libraries = ("cuBLAS ", "cuBLASLt ") if event.name in biased else ("cuBLAS ",)
            made = [w for w in waiting if w.name.endswith(event.phase) and w.name.startswith(libraries)]
            result += [
                SimulatedEvent(KEPT, workspace.bytes, "workspace", event.phase, workspace.name) for workspace in made
            ]
            waiting = [workspace for workspace in waiting if workspace not in made]
    return result + [
        SimulatedEvent(KEPT, workspace.bytes, "workspace", "backward", workspace.name) for workspace in waiting
    ]
