"""Tracing: the memory of a training step, from the real module run on tensors without contents.

The module's own code runs, three steps long, on torch's meta device: every operation knows the shapes of its results
and nothing is computed. What is allocated and freed is recorded in order, with what CUDA does differently put right,
and followed through torch's caching allocator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import torch
from torch import nn

from optplan.planner.models.spec import ModelSpec
from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.precision import PRECISIONS
from optplan.planner.step.options import StepOptions
from optplan.planner.timeline import Phase, Timeline
from optplan.profilers.workloads.catalogue import build_subject
from optplan.profilers.tracing.optimizers import Factory, modelled_part, optimizer_factory
from optplan.profilers.tracing.runs import ORDERS, OptimizerPart, Pieces, RunSimulator, SimulatedRun, run_timeline
from optplan.profilers.tracing.steps import Device, StepTracer
from optplan.profilers.workloads.subject import Subject

Progress = Callable[[str], None]


class StepExtras(msgspec.Struct, frozen=True, kw_only=True):
    """What else happens in a step.

    Attributes:
        clip_grad_norm: Norm to which `torch.nn.utils.clip_grad_norm_` clips the gradients, None for no clipping.
        clip_foreach: Whether clipping takes all gradients in one kernel, torch's default on CUDA.
        keeps_gradients: Whether `zero_grad(set_to_none=False)` keeps the gradients' memory.
    """

    clip_grad_norm: float | None = None
    clip_foreach: bool = True
    keeps_gradients: bool = False


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """A traced training run.

    Attributes:
        timeline: Placement and three steps, every allocation with its name.
        run: The run on a device with descending segment addresses, as drivers mostly give them.
        reserved_range_bytes: Least and most bytes reserved, as the segments' unknown addresses leave open.
        attention: The attention kernels that were chosen.
    """

    timeline: Timeline
    run: SimulatedRun
    reserved_range_bytes: tuple[int, int]
    attention: tuple[str, ...] = ()

    @property
    def phases(self) -> dict[Phase, int]:
        """Largest number of allocated bytes in each phase of a steady step."""
        return self.run.phases


def trace_step(
    model: ModelSpec | Subject,
    options: StepOptions,
    *,
    optimizer: OptimizerModel | Factory | str = "adamw",
    extras: StepExtras | None = None,
    progress: Progress = lambda _: None,
) -> Trace:
    """Trace three training steps of a model with one optimizer.

    Args:
        model: A specification, of which the transformers class is built, or a module with its inputs.
        options: How the step is run; batch and sequence matter only where the inputs are made from them.
        optimizer: A name of the registry, a model of an optimizer, or what makes a `torch.optim.Optimizer`.
        extras: Clipping and what becomes of the gradients.
        progress: Told what is being done.

    Raises:
        ConfigError: The model cannot be built or traced, or the optimizer is unknown.
    """
    tracer = trace_pieces(model, options, extras=extras, progress=progress)
    part = tracer.optimizer_part(build_optimizer(optimizer) if isinstance(optimizer, str) else optimizer)
    return tracer.trace(part)


class TracedStep:
    """Traced micro-steps, to which optimizers are added one by one.

    Attributes:
        pieces: All that is recorded but the optimizer's.
        notes: Findings in words.
    """

    def __init__(self, tracer: StepTracer, spec: ModelSpec | None, options: StepOptions, pieces: Pieces) -> None:
        self.pieces = pieces
        self._tracer = tracer
        self._spec = spec
        self._options = options
        self._simulators: dict[str, RunSimulator] = {}
        self._master_dtype = PRECISIONS[options.precision].master_dtype

    def optimizer_part(self, optimizer: OptimizerModel | Factory) -> OptimizerPart:
        """The optimizer's steps, traced if they can be."""
        factory = optimizer_factory(optimizer) if isinstance(optimizer, OptimizerModel) else optimizer
        if factory is not None:
            return self._traced_part(factory)
        assert isinstance(optimizer, OptimizerModel) and self._spec is not None
        parameters = self._spec.unique_parameters
        dtype = self._options.parameter_dtype
        bound = optimizer.bind(parameters)
        return modelled_part(bound, parameters, OptimizerContext(dtype, dtype))

    def trace(self, part: OptimizerPart) -> Trace:
        """The whole run with one optimizer."""
        runs = [self.simulator(order).simulate(part) for order in ORDERS]
        reserved = [run.reserved_bytes for run in runs]
        return Trace(
            timeline=run_timeline(self.pieces, part),
            run=runs[0],
            reserved_range_bytes=(min(reserved), max(reserved)),
        )

    def simulator(self, order: str) -> RunSimulator:
        """What replays runs on a device whose segments come in this order of addresses."""
        if order not in self._simulators:
            self._simulators[order] = RunSimulator(self.pieces, order)  # type: ignore[arg-type]
        return self._simulators[order]

    def _traced_part(self, factory: Factory) -> OptimizerPart:
        tracer, names = self._tracer, {id(p): name for name, p in self._tracer.subject.trainable().items()}
        with tracer.tracing():
            _fill_gradients(tracer)
            optimizer = factory(list(tracer.subject.trainable().values()))
            first = tracer.run("step", optimizer.step)
            steady = tracer.run("step", optimizer.step)
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.device.type == "meta":
                    tracer.recorder.label(value, "optimizer_state", f"{names[id(parameter)]} {key}")
        return OptimizerPart.of(tracer.timeline(first), tracer.timeline(steady))


def _fill_gradients(tracer: StepTracer) -> None:
    for parameter in tracer.subject.trainable().values():
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)


def trace_pieces(
    model: ModelSpec | Subject,
    options: StepOptions,
    *,
    extras: StepExtras | None = None,
    progress: Progress = lambda _: None,
) -> TracedStep:
    """Trace everything of a step but the optimizer; see `trace_step`."""
    extras = extras or StepExtras()
    spec = model if isinstance(model, ModelSpec) else None
    progress("building the model")
    subject = build_subject(model, options) if isinstance(model, ModelSpec) else model
    device = Device(options.compute_capability, options.resident_threads)
    autocast = getattr(torch, options.autocast_dtype) if options.autocast_dtype else None
    tracer = StepTracer(subject, device, autocast=autocast, progress=progress)
    return TracedStep(tracer, spec, options, _run_pieces(tracer, options, extras))


def _run_pieces(tracer: StepTracer, options: StepOptions, extras: StepExtras) -> Pieces:
    parameters = list(tracer.subject.trainable().values())
    more = clip = zero = slice(0, 0)
    with tracer.tracing():
        load = tracer.place()
        first = tracer.micro_step()
        if options.grad_accum > 1 or extras.keeps_gradients:
            more = tracer.micro_step()
        if extras.clip_grad_norm is not None:
            clip = tracer.run("clip", lambda: _clip(parameters, extras))
        if not extras.keeps_gradients:
            zero = tracer.run("zero", lambda: _end_gradients(parameters))
    added = (tracer.timeline(more),) * (options.grad_accum - 1)
    made = tracer.timeline(first)
    again = tracer.timeline(more) if extras.keeps_gradients else _without_workspaces(made)
    return Pieces(
        tracer.timeline(load), (made, *added), (again, *added), tracer.timeline(clip), tracer.timeline(zero)
    )


def _clip(parameters: Sequence[nn.Parameter], extras: StepExtras) -> None:
    assert extras.clip_grad_norm is not None
    nn.utils.clip_grad_norm_(parameters, extras.clip_grad_norm, foreach=extras.clip_foreach)


def _end_gradients(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _without_workspaces(timeline: Timeline) -> Timeline:
    """A micro-step after the first, which finds the libraries' workspaces in place."""
    ended = {event.id for event in timeline if not hasattr(event, "bytes")}
    return [
        event
        for event in timeline
        if not (hasattr(event, "bytes") and event.category == "workspace" and event.id not in ended)
    ]


