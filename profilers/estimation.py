"""`optplan estimate --engine trace`: the planner's questions answered by running the model itself without contents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Unpack

import msgspec

from optplan.planner.candidates import Candidate, choose_optimizers
from optplan.planner.estimate import estimate_request
from optplan.planner.optimizers.base import OptimizerModel
from optplan.planner.records import EstimateReport, PhasePeak
from optplan.planner.request import StepFlags, StepRequest, check_request
from optplan.planner.requested_step import sharded_view, step_options
from optplan.planner.sharding.registry import FULL_SHARDINGS
from optplan.planner.step.options import StepOptions
from optplan.planner.step_history import StepHistory
from optplan.planner.step_timeline import timeline_of
from optplan.planner.timeline import Timeline
from optplan.planner.timeline_report import TimelineReport
from optplan.planner.units import format_gib
from optplan.planner.workload import StepPeaks, Workload
from optplan.profilers.tracing.optimizers import optimizer_factory
from optplan.profilers.tracing.runs import ORDERS, OptimizerPart, SimulatedRun
from optplan.profilers.tracing.sharded import ShardedTracedStep
from optplan.profilers.tracing.trace import RunSettings, Trace, TracedStep
from optplan.profilers.workloads.source import ModelSource, find_source

Progress = Callable[[str], None]

_SEARCHED = 3
"""Optimizers up to which the largest batch and the range of the reserved bytes are found for each."""
_STRIDE = 8
"""How much larger the next batch is while the peak does not tell how it grows."""
_LINES = 6
"""Batches tried after which the search halves what is left."""
_TOO_LARGE = 1 << 20


def traced_estimate(
    model: str,
    *,
    optimizer: str | Sequence[str] | None = None,
    options: Mapping[str, object] | Sequence[str] | None = None,
    per_tensor: bool = False,
    progress: Progress = lambda _: None,
    **step: Unpack[StepFlags],
) -> EstimateReport:
    """How much GPU memory a training step takes, for one optimizer, several or all of them, by tracing it.

    Args:
        model: Catalogue id or alias, path to a `config.json`, or `package.module:factory`.
        optimizer: Optimizer id or ids; every one when None.
        options: Options of the optimizers, as for `optplan.planner.estimate.estimate`.
        per_tensor: Whether each estimate lists the state of every parameter.
        progress: Told what is being done.
        step: `gpu` or `memory`, and how the step is run, as in `StepFlags`.

    Returns:
        The record that `optplan estimate --engine trace --json` prints.

    Raises:
        ConfigError: Something in the request is unknown, out of range or contradictory, or the model cannot be traced.
    """
    progress("reading the model")
    source = find_source(model)
    step["engine"] = "trace"
    request = check_request(source.spec, **step)
    choices = choose_optimizers(optimizer, options)
    workload = TracedWorkload(request, source, progress=progress, searches=len(choices) <= _SEARCHED)
    return estimate_request(request, choices, per_tensor=per_tensor, workload=workload)


def traced_timeline(
    model: str,
    *,
    optimizer: str = "adamw",
    options: Mapping[str, object] | Sequence[str] | None = None,
    progress: Progress = lambda _: None,
    **step: Unpack[StepFlags],
) -> TimelineReport:
    """Memory over a steady step, what is alive at its peak and what would lower it, by tracing the model.

    Args:
        model: As for `traced_estimate`.
        optimizer: One optimizer id.
        options: Its options.
        progress: Told what is being done.
        step: `gpu` or `memory`, and how the step is run, as in `StepFlags`.

    Raises:
        ConfigError: Something in the request is unknown, out of range or contradictory, or the model cannot be traced.
    """
    progress("reading the model")
    source = find_source(model)
    step["engine"] = "trace"
    workload = TracedWorkload(check_request(source.spec, **step), source, progress=progress, searches=False)
    return timeline_of(workload, optimizer, options)


class TracedWorkload(Workload):
    """Answers for one request by tracing; what the optimizers share is traced once a batch size."""

    simulates_limit = False

    def __init__(
        self,
        request: StepRequest,
        source: ModelSource,
        *,
        progress: Progress = lambda _: None,
        searches: bool = True,
    ) -> None:
        """Prepare; nothing is traced yet.

        Args:
            request: The step.
            source: Where the module comes from.
            progress: Told what is being done.
            searches: Whether the largest batch and the range of the reserved bytes are looked for.
        """
        super().__init__(request)
        self.has_rules = True  # every model that can be built has a traced step
        self._source = source
        self._progress = progress
        self._searches = searches
        self._settings = RunSettings(
            clip_grad_norm=request.config.clip_grad_norm,
            empties_cache=request.config.empty_cache,
            allocator=request.allocator_settings,
        )
        self._traced: dict[int, TracedStep] = {}
        self._parts: dict[OptimizerModel, OptimizerPart] = {}
        self._runs: dict[tuple[OptimizerModel, int], list[SimulatedRun]] = {}

    def at(self, request: StepRequest) -> Workload:
        """Another request, traced too."""
        return TracedWorkload(request, self._source, progress=self._progress, searches=self._searches)

    def peaks(self, candidate: Candidate, *, batch_size: int | None = None) -> StepPeaks:
        """Peaks of the step by phase."""
        runs = self._traced_runs(candidate, batch_size or self.request.config.batch_size)
        reserved = [run.reserved_bytes for run in runs]
        phases = {phase: PhasePeak(num_bytes) for phase, num_bytes in runs[0].phases.items()}
        return StepPeaks(
            phases,
            runs[0].peak_phase,
            runs[0].categories,
            runs[0].reserved_bytes,
            (min(reserved), max(reserved)) if self._searches else None,
        )

    def rounded_peak_bytes(self, candidate: Candidate, *, batch_size: int | None = None) -> int:
        """The peak: a trace knows no quicker one."""
        return self.peaks(candidate, batch_size=batch_size).peak_bytes

    def max_batch_size(self, candidate: Candidate) -> int | None:
        """Largest micro-batch whose traced peak fits, 0 if none does; None where many optimizers are asked for."""
        if not self._searches:
            return None
        usable, asked = self.usable_bytes, self.request.config.batch_size
        return _largest(lambda batch: self.peaks(candidate, batch_size=batch).peak_bytes, usable, start=asked)

    def notes(self, candidate: Candidate) -> list[str]:
        """Whether the optimizer was run or its step is the planner's, and what the reserved bytes depend on."""
        is_traced = optimizer_factory(candidate.optimizer) is not None and not self.request.config.step_in_backward
        notes = super().notes(candidate)
        notes.append("its step was traced" if is_traced else "its step is the planner's, the rest was traced")
        least, most = self.peaks(candidate).reserved_range_bytes or (0, 0)
        if least < most:
            between = f"between {format_gib(least)} and {format_gib(most)}"
            held = self._strategy is not None and any(True for _ in self._strategy.replaced(sharded_view(self.request)))
            when = " and on when the communication library lets go of DDP's first bucket" if held else ""
            notes.append(f"reserved {between}, depending on where the driver puts segments{when}")
        return notes

    def findings(self) -> list[str]:
        """Which attention kernels run, and what follows from it."""
        kernels = self._step(self.request.config.batch_size).attention
        notes = [f"attention kernel: {', '.join(kernels)}"] if kernels else []
        if "math" in kernels:
            notes.append("attention falls to the math kernel, which keeps every attention weight")
        return notes

    def step_timeline(self, candidate: Candidate) -> Timeline:
        """What the optimizer's `step()` allocates and frees besides its state."""
        return self._part(candidate).steady

    def history(self, candidate: Candidate) -> StepHistory:
        """The last step event by event."""
        return self._step(self.request.config.batch_size).history(candidate.optimizer, self._parameters)

    def trace(self, candidate: Candidate) -> Trace:
        """The run with one optimizer, as one timeline."""
        return self._step(self.request.config.batch_size).trace(candidate.optimizer, self._parameters)

    def _traced_runs(self, candidate: Candidate, batch_size: int) -> list[SimulatedRun]:
        key = (candidate.optimizer, batch_size)
        if key not in self._runs:
            step = self._step(batch_size)
            orders = ORDERS if self._searches else ORDERS[:1]
            if self.request.config.step_in_backward:
                self._runs[key] = step.simulate_in_backward(candidate.optimizer, self._parameters, orders)
            else:
                self._runs[key] = step.simulate(self._part(candidate), orders)
        return self._runs[key]

    def _step(self, batch_size: int) -> TracedStep:
        if batch_size not in self._traced:
            options = step_options(self.request, batch_size=batch_size)
            self._progress(
                f"tracing {self._source.spec.name}, batch {batch_size}, {options.checkpointing} checkpointing"
            )
            self._traced[batch_size] = self._trace_step(options)
        return self._traced[batch_size]

    def _trace_step(self, options: StepOptions) -> TracedStep:
        strategy = self.request.strategy
        if strategy is None:
            return TracedStep(self._source.subject(options), options, self._settings)
        stored = options
        if options.precision == "mixed" and self.request.config.sharding in FULL_SHARDINGS:
            stored = msgspec.structs.replace(options, precision="fp32")
        return ShardedTracedStep(
            self._source.subject(stored),
            options,
            self._settings,
            sharding=self.request.config.sharding,
            strategy=strategy,
            parameters=self.request.model.unique_parameters,
        )

    def _part(self, candidate: Candidate) -> OptimizerPart:
        key = candidate.optimizer
        if key not in self._parts:
            self._progress(f"the step of {candidate.id}")
            step = next(iter(self._traced.values()), None) or self._step(self.request.config.batch_size)
            self._parts[key] = step.part(key, self._parameters)
        return self._parts[key]


def _largest(peak_bytes: Callable[[int], int], usable: int, *, start: int) -> int:
    """The largest batch whose peak is within `usable`, 0 if none is.

    Peaks grow nearly in proportion to the batch: each guess is the line through the two batches tried last.
    """
    tried = {start: peak_bytes(start)}
    while True:
        largest = max((batch for batch, peak in tried.items() if peak <= usable), default=0)
        smallest = min((batch for batch, peak in tried.items() if peak > usable), default=_TOO_LARGE)
        if smallest - largest == 1:
            return largest
        guess = _guess(tried, usable) if len(tried) < _LINES else (largest + min(smallest, 4 * largest + 4)) // 2
        guess = min(max(guess, largest + 1), smallest - 1)
        tried[guess] = peak_bytes(guess)


def _guess(tried: Mapping[int, int], usable: int) -> int:
    """Where the line through the two batches next to the limit reaches it."""
    nearest = sorted(tried.items(), key=lambda pair: abs(pair[1] - usable))[:2]
    if len(nearest) == 1:
        batch, peak = nearest[0]
        return _STRIDE * batch if peak <= usable else 1
    (left, low), (right, high) = nearest
    if high == low:
        return _STRIDE * max(tried)
    return left + (usable - low) * (right - left) // (high - low)
