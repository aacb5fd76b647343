"""A request at work: its step's memory with each optimizer, shared parts computed once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import msgspec

from optplan.planner.candidates import (
    BASELINE,
    Candidate,
    OptimizerChoice,
    bind_candidates,
    bind_runnable,
)
from optplan.planner.dtypes import ITEMSIZE_BYTES
from optplan.planner.errors import ConfigError
from optplan.planner.largest_batch import largest_batch
from optplan.planner.optimizers.base import OptimizerModel
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.rank_optimizers import RankOptimizers
from optplan.planner.records import PhasePeak, ResidentBytes, Saving
from optplan.planner.request import StepRequest, at_stage
from optplan.planner.requested_step import largest_stage, num_in_flight, resident_bytes, sharded_view
from optplan.planner.sharding.report import rank_notes, resident_sizes
from optplan.planner.shortage import LimitedRun, Shortage
from optplan.planner.step.optimizer_step import temporary_bytes
from optplan.planner.step.rules import has_rules
from optplan.planner.step.simulated_device import SimulatedStep
from optplan.planner.step.simulation import StepSimulator
from optplan.planner.step_history import StepHistory
from optplan.planner.step_simulators import StepSimulators, makes_same_micro_steps, takes_same_optimizer_step
from optplan.planner.timeline import Category, Phase, Timeline

_TRUSTED_ROOM = 0.1
"""Share of the usable bytes that a peak of rounded sums must leave for a first answer without a simulation: measured
steps allocate up to 3.6 % more than the sums of their rounded requests. Fragmentation can still refuse such a step."""
_STEPS_WITHOUT_LIMIT = 2
"""Steps that the simulation of the peaks takes at least."""


class StepPeaks(msgspec.Struct, frozen=True):
    """Peaks of a steady step in allocated bytes, what is alive at the largest of them, and the bytes reserved."""

    phases: dict[Phase, PhasePeak]
    peak_phase: Phase
    categories: dict[Category, int]
    reserved_bytes: int
    reserved_range_bytes: tuple[int, int] | None = None

    @property
    def peak_bytes(self) -> int:
        """The largest of the phases' peaks."""
        return self.phases[self.peak_phase].peak_allocated_bytes

    @property
    def most_reserved_bytes(self) -> int:
        """The upper end of the bytes reserved."""
        return max(self.reserved_range_bytes or (self.reserved_bytes,))


class Workload:
    """Answers for one request; what the optimizers share is computed once a batch size.

    Attributes:
        simulates_limit: Whether steps that fit by bytes are simulated on a device of that size.
    """

    simulates_limit = True

    def __init__(self, request: StepRequest) -> None:
        if request.config.pipeline_parallel > 1 and has_rules(request.model):
            request = at_stage(request, largest_stage(request))
        self.request = request
        self.has_rules = has_rules(request.model)
        self._peaks: dict[tuple[OptimizerModel, int], StepPeaks] = {}
        self._limited_runs: dict[tuple[OptimizerModel, int], LimitedRun] = {}
        self._shortages: dict[tuple[OptimizerModel, int], Shortage | None] = {}
        self._temporary_bytes: dict[OptimizerModel, int] = {}
        self._baseline: Candidate | None = None
        self._strategy = request.strategy
        self._optimizers = RankOptimizers(request)
        self._parameters = self._optimizers.parameters
        self._simulators = StepSimulators(request, self._parameters)

    def at(self, request: StepRequest) -> Workload:
        """Another request answered in the same way; what both have in common is not worked out again."""
        other = Workload(request)
        if makes_same_micro_steps(request, self.request):
            other._simulators.share_records(self._simulators)
        if takes_same_optimizer_step(request, self.request):
            other._optimizers.share_steps(self._optimizers)
            other._temporary_bytes = self._temporary_bytes
        return other

    def notes(self, candidate: Candidate) -> list[str]:
        """What is to be known about the candidate's row besides the figures."""
        shortage = self.shortage(candidate)
        return [str(shortage)] if shortage else []

    def findings(self) -> list[str]:
        """What is to be known about the step besides the figures."""
        if self.has_rules:
            return rank_notes(self.request)
        family = self.request.model.model_type
        return [f"{family} models have no step rules in this version: their peak is not predicted; try --engine trace"]

    def candidates(self, choices: Sequence[OptimizerChoice]) -> tuple[list[Candidate], list[tuple[str, str]]]:
        """The choices bound to the model, and those left out with the reason."""
        return bind_candidates(self.request, choices)

    def resident(self, candidate: Candidate) -> ResidentBytes:
        """Unrounded bytes of the tensors that live across the step."""
        policy, count = self.request.policy, self.request.rank_model.num_parameters
        updated = sum(parameter.numel for parameter in self._parameters)
        parameters = count * ITEMSIZE_BYTES[policy.parameter_dtype]
        trained = sum(parameter.numel for parameter in self.request.rank_model.trained_parameters)
        gradients = 0 if self.request.config.step_in_backward else trained * ITEMSIZE_BYTES[policy.gradient_dtype]
        if self._strategy is not None:
            parameters, gradients = resident_sizes(self._strategy, sharded_view(self.request))
        return ResidentBytes(
            parameters=parameters,
            gradients=gradients,
            master_weights=updated * ITEMSIZE_BYTES[policy.master_dtype] if policy.master_dtype else 0,
            optimizer_state=candidate.footprint.device_bytes,
        )

    def peaks(self, candidate: Candidate, *, batch_size: int | None = None) -> StepPeaks | None:
        """Peaks of the step by phase, None for a family without step rules."""
        if not self.has_rules:
            return None
        key = (candidate.optimizer, batch_size or self.request.config.batch_size)
        if key not in self._peaks:
            step = self._simulated(candidate, self._simulators.without_limit(key[1]))
            phases = {phase: PhasePeak(num_bytes) for phase, num_bytes in step.phases.items()}
            reserved = (step.reserved_bytes, step.reserved_range_bytes)
            self._peaks[key] = StepPeaks(phases, step.peak_phase, step.categories, *reserved)
        return self._peaks[key]

    def remember(self, optimizer: OptimizerModel, peaks: StepPeaks) -> None:
        """Take peaks of the step as asked that were found before, in the place of a simulation of them."""
        self._peaks[optimizer, self.request.config.batch_size] = peaks

    @property
    def num_events(self) -> int:
        """Events of the forward and backward of a step's micro-batches, of those that differ."""
        return self._simulators.without_limit(self.request.config.batch_size).num_events

    def _simulated(self, candidate: Candidate, simulator: StepSimulator) -> SimulatedStep:
        if self.request.config.step_in_backward:
            return simulator.simulate_in_backward(self._optimizers.parameter_steps(candidate))
        return simulator.simulate(self._optimizers.state_sizes(candidate), self.step_timeline(candidate))

    def history(self, candidate: Candidate) -> StepHistory | None:
        """The steady step event by event, None for a family without step rules."""
        if not self.has_rules:
            return None
        simulator = self._simulators.without_limit(self.request.config.batch_size)
        if self.request.config.step_in_backward:
            return simulator.history_in_backward(self._optimizers.parameter_steps(candidate))
        sizes, names = self._optimizers.state_sizes(candidate), self._optimizers.state_names(candidate)
        return simulator.history(sizes, self.step_timeline(candidate), names=names)

    @property
    def usable_bytes(self) -> int:
        """What a steady step may allocate: the GPU's usable bytes, less what a step before it needs more."""
        if self._strategy is None or not self.has_rules:
            return self.request.gpu.usable_bytes
        replaced = self._strategy.replaced(sharded_view(self.request))
        return self.request.gpu.usable_bytes - sum(num_bytes for _, num_bytes, _ in replaced)

    def rounded_peak_bytes(self, candidate: Candidate, *, batch_size: int | None = None) -> int:
        """The peak as a sum of requests rounded up to 512 bytes: quick, and a few percent too low at worst."""
        memory = self._simulators.memory(batch_size or self.request.config.batch_size)
        step = sum(memory.after_backward.values()) + self.temporary_bytes(candidate)
        waiting = (num_in_flight(self.request) - 1) * memory.saved
        highest = max(sum(memory.forward.values()) + waiting, sum(memory.backward.values()) + waiting, step)
        return sum(resident_bytes(self.request).values()) + candidate.footprint.rounded_device_bytes + highest

    def fits(self, candidate: Candidate) -> bool | None:
        """Whether the peak is within the GPU's usable bytes; None if only the resident bytes are known and they are."""
        if self.peaks(candidate) is not None:
            return self._comes_through(candidate, self.request.config.batch_size)
        return None if self.resident(candidate).total <= self.usable_bytes else False

    def _comes_through(self, candidate: Candidate, batch_size: int) -> bool:
        peaks = self.peaks(candidate, batch_size=batch_size)
        fits = peaks is not None and peaks.peak_bytes <= self.usable_bytes
        return fits and self.shortage(candidate, batch_size=batch_size) is None

    def shortage(self, candidate: Candidate, *, batch_size: int | None = None) -> Shortage | None:
        """The request that fails in steps whose peak is within the usable bytes; None if they come through."""
        key = (candidate.optimizer, batch_size or self.request.config.batch_size)
        if key not in self._shortages:
            self._shortages[key] = self._find_shortage(candidate, key[1])
        return self._shortages[key]

    def _find_shortage(self, candidate: Candidate, batch_size: int) -> Shortage | None:
        peaks, most = self.peaks(candidate, batch_size=batch_size), self.request.gpu.usable_bytes
        if peaks is None or peaks.peak_bytes > self.usable_bytes or peaks.most_reserved_bytes <= most:
            return None
        # However much room the sums leave: these steps reserve more than there is unless the allocator is held to it.
        return self._within_limit(candidate, batch_size).shortage if self.can_hold_to_limit() else None

    def num_flushes(self, candidate: Candidate) -> int | None:
        """How often in a steady step the allocator gives its cache back and asks again; None if that is not known."""
        if not self.can_hold_to_limit() or not self.fits(candidate):
            return None
        peaks = self.peaks(candidate)
        if peaks is None or peaks.most_reserved_bytes <= self.request.gpu.usable_bytes:
            return 0
        run = self._within_limit(candidate, self.request.config.batch_size)
        return run.num_flushes if run.shortage is None else None

    def _within_limit(self, candidate: Candidate, batch_size: int) -> LimitedRun:
        """What becomes of steps on a device of this size."""
        if (key := (candidate.optimizer, batch_size)) not in self._limited_runs:
            sizes, step = self._optimizers.state_sizes(candidate), self.step_timeline(candidate)
            self._limited_runs[key] = self._simulators.within_limit(batch_size).run(sizes, step)
        return self._limited_runs[key]

    def sure_shortage(self, candidate: Candidate) -> Shortage | None:
        """The request that fails in the first two steps, found without the peaks; `fits` says False of such a step."""
        # Without a limit these steps reserve more than there is: the peak is too high, or this is the shortage.
        size = self.request.config.batch_size
        failure = self._within_limit(candidate, size).shortage if self._asks_limit(candidate, size) else None
        return failure if failure is not None and failure.num_steps < _STEPS_WITHOUT_LIMIT else None

    def _asks_limit(self, candidate: Candidate, batch_size: int) -> bool:
        return self.can_hold_to_limit() and not self.leaves_room(
            self.rounded_peak_bytes(candidate, batch_size=batch_size)
        )

    def can_hold_to_limit(self) -> bool:
        """Whether steps are simulated on a device of this size where they reserve more than there is."""
        # An optimizer that steps within backward leaves nothing of the gradients to give back.
        return self.has_rules and self.simulates_limit and not self.request.config.step_in_backward

    def max_batch_size(self, candidate: Candidate) -> int | None:
        """Largest micro-batch that runs in the usable bytes, 0 if not even one sequence does.

        Found by bisection over the quick peaks; the simulation has the last word, so that an estimate of this
        micro-batch does not refuse it.
        """
        if not self.has_rules:
            return None
        usable = self.usable_bytes
        return largest_batch(
            fits_by_sums=lambda size: self.rounded_peak_bytes(candidate, batch_size=size) <= usable,
            fits=partial(self._comes_through, candidate),
            guess=partial(self._unhurt_size, candidate),
        )

    def _unhurt_size(self, candidate: Candidate, batch_size: int) -> int:
        """About the micro-batch that fragmentation takes nothing from, where a larger one would reserve too much."""
        peaks, kept = self.peaks(candidate, batch_size=batch_size), self.resident(candidate).total
        reserved = peaks.most_reserved_bytes if peaks is not None else 0
        return batch_size * max(self.usable_bytes - kept, 0) // max(reserved - kept, 1)

    def leaves_room(self, num_bytes: int) -> bool:
        """Whether a peak of rounded sums leaves so much that a simulation will hardly refuse it."""
        return num_bytes <= self.usable_bytes * (1 - _TRUSTED_ROOM)

    def state_variants(self, candidate: Candidate) -> dict[str, int]:
        """Bytes of device state under each of the optimizer's variants, such as the ends of Adapprox's rank."""
        return self._optimizers.state_variants(candidate)

    def saving(self, candidate: Candidate) -> Saving | None:
        """What the optimizer saves against AdamW, None for AdamW itself or where AdamW cannot run."""
        baseline = self._adamw()
        if baseline is None or candidate.optimizer == baseline.optimizer:
            return None
        state = baseline.footprint.device_bytes - candidate.footprint.device_bytes
        ours, theirs = self.peaks(candidate), self.peaks(baseline)
        return Saving(state, theirs.peak_bytes - ours.peak_bytes if ours and theirs else None)

    def _adamw(self) -> Candidate | None:
        if self._baseline is None:
            try:
                self._baseline = bind_runnable(self.request, build_optimizer(BASELINE))
            except ConfigError:
                return None
        return self._baseline

    def moved_bytes(self, candidate: Candidate) -> int:
        """Bytes that the optimizer's `step()` must at least read and write: each tensor once, each result once."""
        return self._optimizers.moved_bytes(candidate)

    def temporary_bytes(self, candidate: Candidate) -> int:
        """Most bytes that the optimizer's `step()` has allocated at once besides its state, rounded."""
        key = candidate.optimizer
        if key not in self._temporary_bytes:
            steps = [self.step_timeline(candidate)]
            if self.request.config.step_in_backward:
                steps = [step.timeline for step in self._optimizers.parameter_steps(candidate).values()]
            self._temporary_bytes[key] = max(map(temporary_bytes, steps))
        return self._temporary_bytes[key]

    def step_timeline(self, candidate: Candidate) -> Timeline:
        """What the optimizer's `step()` allocates and frees besides its state."""
        return self._optimizers.step(candidate)
