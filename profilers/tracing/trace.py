"""Tracing: the memory of a training step, from the real module run on tensors without contents.

The module's own code runs on torch's meta device: every operation knows the shapes of its results and nothing is
computed. What is allocated and freed is recorded in order, with what CUDA does differently put right, and followed
through torch's caching allocator for three steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import msgspec
import torch
from torch import nn

from optplan.planner.allocator.settings import AllocatorSettings
from optplan.planner.dtypes import Dtype
from optplan.planner.errors import ConfigError
from optplan.planner.models.spec import ModelSpec
from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.precision import PRECISIONS
from optplan.planner.step.options import StepOptions
from optplan.planner.step_history import StepHistory
from optplan.planner.tensors import Parameter
from optplan.planner.timeline import Allocation, Event, Phase, Timeline
from optplan.profilers.tracing.history import run_history
from optplan.profilers.tracing.optimizers import Factory, modelled_part, optimizer_factory
from optplan.profilers.tracing.runs import (
    ORDERS,
    OptimizerPart,
    Order,
    Pieces,
    RunSimulator,
    SimulatedRun,
    run_timeline,
    spliced,
)
from optplan.profilers.tracing.steps import Device, StepTracer
from optplan.profilers.workloads.catalogue import build_subject
from optplan.profilers.workloads.described import described_parameters
from optplan.profilers.workloads.subject import Subject


class RunSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What surrounds forward and backward in a training run.

    Attributes:
        clip_grad_norm: Norm to which `torch.nn.utils.clip_grad_norm_` clips the gradients, None for no clipping.
        clip_foreach: Whether clipping takes all gradients in one kernel, torch's default on CUDA.
        empties_cache: Whether `torch.cuda.empty_cache()` follows every step.
        allocator: Settings of the caching allocator.
    """

    clip_grad_norm: float | None = None
    clip_foreach: bool = True
    empties_cache: bool = False
    allocator: AllocatorSettings = AllocatorSettings()


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """A traced training run.

    Attributes:
        timeline: Placement and three steps, every allocation with its name.
        run: The run on a device with descending segment addresses, as drivers mostly give them.
        reserved_range_bytes: Least and most bytes reserved, as the segments' unknown addresses leave open, and how long
            a communication library holds what was reduced first.
        attention: The attention kernels that were chosen.
    """

    timeline: Timeline
    run: SimulatedRun
    reserved_range_bytes: tuple[int, int]
    attention: tuple[str, ...]

    @property
    def phases(self) -> dict[Phase, int]:
        """Largest number of allocated bytes in each phase of a steady step."""
        return self.run.phases


def trace_step(
    model: ModelSpec | Subject,
    options: StepOptions,
    *,
    optimizer: OptimizerModel | Factory | str = "adamw",
    settings: RunSettings | None = None,
) -> Trace:
    """Trace three training steps of a model with one optimizer.

    Args:
        model: A specification, of which the transformers class is built, or a module with its inputs.
        options: How the step is run; batch and sequence matter only where the inputs are made from them.
        optimizer: A name of the registry, a model of an optimizer, or what makes a `torch.optim.Optimizer`.
        settings: Clipping, and the allocator's settings.

    Raises:
        ConfigError: The model cannot be built or traced, or the optimizer is unknown.
    """
    step = TracedStep(model if isinstance(model, Subject) else build_subject(model, options), options, settings)
    return step.trace(build_optimizer(optimizer) if isinstance(optimizer, str) else optimizer)


class TracedStep:
    """Traced micro-steps, to which optimizers are added one by one.

    Attributes:
        pieces: All that is recorded but the optimizer's.
        attention: The attention kernels that were chosen, each once.
    """

    def __init__(self, subject: Subject, options: StepOptions, settings: RunSettings | None = None) -> None:
        """Trace placement, micro-steps and clipping.

        Raises:
            ConfigError: The step's memory depends on values.
        """
        self._options = options
        self._settings = settings or RunSettings()
        self._master = self._master_dtype()
        self._simulators: dict[Order, RunSimulator] = {}
        self._tracer = self._make_tracer(subject)
        try:
            self.pieces = self._run_pieces()
        except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError) as error:
            # The module is not ours: whatever it does that cannot be done without contents ends here.
            where = self._tracer.where or type(subject.module).__name__
            raise ConfigError(f"{where} cannot be run without contents: {_sentence(error)}") from error
        self.attention = tuple(dict.fromkeys(self._tracer.attention))

    def _master_dtype(self) -> Dtype | None:
        return PRECISIONS[self._options.precision].master_dtype

    def _make_tracer(self, subject: Subject) -> StepTracer:
        return StepTracer(subject, **self._tracer_arguments())

    def _tracer_arguments(self) -> dict[str, Any]:
        options = self._options
        return {
            "device": Device(options.compute_capability, options.resident_threads, options.padding_mask),
            "autocast": getattr(torch, options.autocast_dtype) if options.autocast_dtype else None,
            "master": getattr(torch, self._master) if self._master else None,
        }

    def _run_pieces(self) -> Pieces:
        return _run_pieces(self._tracer, self._options, self._settings)

    def part(self, optimizer: OptimizerModel | Factory, parameters: Sequence[Parameter] = ()) -> OptimizerPart:
        """The optimizer's steps: traced if its class can be run without contents, else as the planner has them.

        Args:
            optimizer: An optimizer, or what makes one.
            parameters: The module's parameters in the planner's words; read off the module if left out.
        """
        factory = optimizer_factory(optimizer) if isinstance(optimizer, OptimizerModel) else optimizer
        if factory is not None:
            return self._traced_part(factory)
        assert isinstance(optimizer, OptimizerModel)
        return self._modelled_part(optimizer, parameters or described_parameters(self._tracer.subject.module))

    def trace(self, optimizer: OptimizerModel | Factory, parameters: Sequence[Parameter] = ()) -> Trace:
        """The whole run with one optimizer; arguments as for `part`."""
        pieces, part = self._run_of(optimizer, parameters)
        if pieces is self.pieces:
            runs = self.simulate(part)
        else:
            runs = [self._simulator(pieces, order).simulate(part) for order in ORDERS]
        reserved = [run.reserved_bytes for run in runs]
        return Trace(
            timeline=run_timeline(pieces, part),
            run=runs[0],
            reserved_range_bytes=(min(reserved), max(reserved)),
            attention=self.attention,
        )

    def simulate(self, part: OptimizerPart, orders: Sequence[Order] = ORDERS) -> list[SimulatedRun]:
        """The run with one optimizer for each order of segment addresses; the first is the one that is expected."""
        return [self._simulator(self.pieces, order).simulate(part) for order in orders]

    def simulate_in_backward(
        self, optimizer: OptimizerModel, parameters: Sequence[Parameter], orders: Sequence[Order] = ORDERS
    ) -> list[SimulatedRun]:
        """The run with an optimizer that takes each parameter's step as its gradient comes, for each order."""
        pieces = self._with_steps(optimizer, parameters)
        return [self._simulator(pieces, order).simulate(OptimizerPart([], [])) for order in orders]

    def history(self, optimizer: OptimizerModel | Factory, parameters: Sequence[Parameter] = ()) -> StepHistory:
        """The last step of the run event by event; arguments as for `part`."""
        pieces, part = self._run_of(optimizer, parameters)
        settings = self._settings
        return run_history(pieces, part, settings=settings.allocator, empties_cache=settings.empties_cache)

    def _run_of(
        self, optimizer: OptimizerModel | Factory, parameters: Sequence[Parameter]
    ) -> tuple[Pieces, OptimizerPart]:
        if not self._options.step_in_backward:
            return self.pieces, self.part(optimizer, parameters)
        assert isinstance(optimizer, OptimizerModel)
        parameters = parameters or described_parameters(self._tracer.subject.module)
        return self._with_steps(optimizer, parameters), OptimizerPart([], [])

    def _simulator(self, pieces: Pieces, order: Order) -> RunSimulator:
        settings = self._settings
        if pieces is not self.pieces:
            return RunSimulator(pieces, order, settings=settings.allocator, empties_cache=settings.empties_cache)
        if order not in self._simulators:
            self._simulators[order] = RunSimulator(
                pieces, order, settings=settings.allocator, empties_cache=settings.empties_cache
            )
        return self._simulators[order]

    def _with_steps(self, optimizer: OptimizerModel, parameters: Sequence[Parameter]) -> Pieces:
        """The pieces with each parameter's step within the backward, right before its gradient's end."""
        parts = {p.name: self._modelled_part(optimizer, [p]) for p in parameters}
        ends = {id_: parts[name] for name, id_ in self._tracer.used_up.items()}
        first, steady = self.pieces.first[0], self.pieces.steady[0]
        return self.pieces._replace(first=(spliced(first, ends),), steady=(spliced(steady, ends, is_first=False),))

    def _modelled_part(self, optimizer: OptimizerModel, parameters: Sequence[Parameter]) -> OptimizerPart:
        dtype = self._master or self._options.parameter_dtype
        bound, context = optimizer.bind(parameters), OptimizerContext(dtype, dtype)
        return modelled_part(bound, parameters, context, master=self._master)

    def _traced_part(self, factory: Factory) -> OptimizerPart:
        tracer = self._tracer
        with tracer.tracing():
            for parameter in tracer.trained().values():
                parameter.grad = torch.empty_like(parameter)
            optimizer = factory(list(tracer.updated.values()))
            first, steady = tracer.optimizer_step(optimizer), tracer.optimizer_step(optimizer)
        _label_state(tracer, optimizer)
        _end_gradients(list(tracer.trained().values()))
        return OptimizerPart.of(tracer.timeline(first), tracer.timeline(steady)).apart()


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _label_state(tracer: StepTracer, optimizer: torch.optim.Optimizer) -> None:
    names = {id(parameter): name for name, parameter in tracer.updated.items()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.device.type == "meta":
                tracer.recorder.label(value, "optimizer_state", f"{names[id(parameter)]} {key}")


def _run_pieces(tracer: StepTracer, options: StepOptions, settings: RunSettings) -> Pieces:
    parameters = list(tracer.subject.trainable().values())
    more = clip = zero = slice(0, 0)
    with tracer.tracing(), tracer.using_gradients_up() if options.step_in_backward else nullcontext():
        load = tracer.place()
        first = again = tracer.micro_step()
        if options.has_gradients:
            more = tracer.micro_step()
        if settings.clip_grad_norm is not None:
            clip = tracer.run("clip", lambda: clip_gradients(parameters, settings))
        if options.keep_grads:
            again = more
        else:
            zero = tracer.run("zero", lambda: _end_gradients(parameters))
    _end_gradients(parameters)
    added = (tracer.timeline(more),) * (options.grad_accum - 1)
    return Pieces(
        load=tracer.timeline(load),
        first=(tracer.timeline(first), *added),
        steady=(_without_lasting(tracer.timeline(again)), *added),
        clip=tracer.timeline(clip),
        zero=tracer.timeline(zero),
    )


def clip_gradients(parameters: Sequence[nn.Parameter], settings: RunSettings) -> None:
    """Clip to the norm that the settings ask for."""
    assert settings.clip_grad_norm is not None
    nn.utils.clip_grad_norm_(parameters, settings.clip_grad_norm, foreach=settings.clip_foreach)


def _end_gradients(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _without_lasting(timeline: Timeline) -> Timeline:
    """A micro-step after the first, which finds in place what the first made for good: workspaces, modules' caches."""
    ended = {event.id for event in timeline if not isinstance(event, Allocation)}

    def is_made_for_good(event: Event) -> bool:
        return isinstance(event, Allocation) and event.category != "gradients" and event.id not in ended

    return [event for event in timeline if not is_made_for_good(event)]
