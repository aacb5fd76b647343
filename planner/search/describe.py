"""A configuration that was found as a record: simulated, timed, with its evidence and its command."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from optplan.planner.flushes import flush_note
from optplan.planner.gpus import Gpu
from optplan.planner.recommend import ROOM, command_of
from optplan.planner.request import StepRequest
from optplan.planner.search.evidence import describe_evidence
from optplan.planner.search.explore import Exploration, Found
from optplan.planner.search.question import Question
from optplan.planner.search.records import Configuration, Time, TimeBasis, Verdict
from optplan.planner.search.steps import request_of
from optplan.planner.step_time import basis_of, micro_steps, timed_gpu
from optplan.planner.step_time_links import link_basis
from optplan.planner.step_time_overlap import combine
from optplan.planner.workload import StepPeaks, Workload


class Describer:
    """Turns what was found into records; a configuration is simulated at most once."""

    def __init__(self, question: Question, exploration: Exploration) -> None:
        self.question = question
        self.exploration = exploration
        self._peaks: dict[Found, StepPeaks | None] = {}

    def describe(self, found: Found, *, simulate: bool) -> Configuration:
        """The record of a configuration; what has been simulated before is taken from there."""
        if simulate:
            self.simulate(found)
        peaks, request = self._peaks.get(found), self.request(found)
        candidate, limit = found.bound.candidate, self._limit(found)
        peak = peaks.peak_bytes if peaks else found.peak_bytes
        return Configuration(
            optimizer=candidate.id,
            implementation=candidate.implementation,
            options=candidate.options,
            settings=candidate.settings,
            state_dtype=request.state_dtype,
            config=request.config,
            tokens_per_step=tokens_of(found),
            verdict=self.verdict(found),
            peak_allocated_bytes=peak,
            is_simulated=peaks is not None,
            peak_reserved_bytes=peaks.reserved_bytes if peaks else None,
            margin_bytes=limit - peak,
            time=self._time(found, request),
            evidence=describe_evidence(
                candidate.optimizer,
                request.config.precision,
                state_dtype=request.state_dtype,
                step_in_backward=found.manner.step_in_backward,
            ),
            command=command_of(Workload(request), candidate),
        )

    def verdict(self, found: Found) -> Verdict:
        """Whether it fits with the room that the validated error asks for; by the rounded sums if not simulated."""
        limit, peaks = self._limit(found), self._peaks.get(found)
        if peaks is None:
            return "fits" if found.peak_bytes <= limit * (1 - ROOM) else "tight"
        if peaks.peak_bytes > limit:
            return "does not fit"
        return "fits" if peaks.most_reserved_bytes <= limit * (1 - ROOM) else "tight"

    def _limit(self, found: Found) -> int:
        return self.exploration.limit_of(found.bound.frame)

    def simulate(self, found: Found) -> Verdict:
        """Replay the step through the allocator; the verdict that follows."""
        if found not in self._peaks:
            self._peaks[found] = Workload(self.request(found)).peaks(found.bound.candidate)
        return self.verdict(found)

    def comes_through(self, found: Found) -> bool:
        """Whether an estimate says that it fits, on a GPU that has no more than may be taken of this one."""
        self.simulate(found)
        peaks = self._peaks[found]
        if peaks is None:
            return False
        return self._allowed(found, peaks).fits(found.bound.candidate) is True

    def flushes(self, found: Found) -> str | None:
        """What is to be known of a step that fits because the allocator gives its cache back, if it does."""
        self.simulate(found)
        peaks = self._peaks[found]
        if peaks is None or self.verdict(found) != "tight":
            return None
        return flush_note(self._allowed(found, peaks), found.bound.candidate, tries_changes=True)

    def _allowed(self, found: Found, peaks: StepPeaks) -> Workload:
        """The step on a GPU that has no more than may be taken of this one, its peaks known."""
        request = self.request(found)
        total_bytes = self.exploration.allowed_bytes(found.bound.frame) + request.gpu.outside_bytes
        gpu = msgspec.structs.replace(request.gpu, total_bytes=total_bytes)
        workload = Workload(msgspec.structs.replace(request, gpu=gpu))
        workload.remember(found.bound.candidate.optimizer, peaks)
        return workload

    def request(self, found: Found) -> StepRequest:
        """The step of a configuration."""
        frame = found.bound.workload.request
        return request_of(frame, found.manner, found.micro_batch, found.accumulated)

    def _time(self, found: Found, request: StepRequest) -> Time:
        model, gpu = self.exploration.model, self.exploration.gpu
        micro = micro_steps(self.exploration.work_of(found), request, gpu, model=model)
        seconds = combine(micro, found.bound.update(gpu, model), exponent=model.overlap.exponent)
        candidate, errors = found.bound.candidate, model.errors.expected(seconds.bound, gpus=request.config.gpus)
        return Time(
            step_seconds=seconds.step,
            forward_seconds=seconds.forward,
            backward_seconds=seconds.backward,
            optimizer_seconds=seconds.optimizer,
            tokens_per_second=tokens_of(found) / seconds.step,
            bound=seconds.bound,
            basis=self._basis(request),
            optimizer_basis=model.rates_of(candidate.id, candidate.implementation).basis,
            link_basis=link_basis(request, model=model) if request.config.gpus > 1 else None,
            median_error=errors.median,
            largest_error=errors.largest,
        )

    def _basis(self, request: StepRequest) -> TimeBasis:
        if timed_gpu(self.question.base.gpu) is None:
            return "assumed"
        return basis_of(self.exploration.gpu) if request.config.gpus == 1 else "scaled"


def tokens_of(found: Found) -> int:
    """Tokens of one step over all GPUs."""
    config = found.bound.frame.request.config
    return found.micro_batch * found.accumulated * config.gpus * config.seq_len


def rated_gpu(gpu: Gpu, substitute: Gpu) -> Gpu:
    """The GPU whose rates are taken: itself, or the substitute for a memory budget."""
    return timed_gpu(gpu) or substitute


def title_of(row: Configuration) -> str:
    """A configuration in a few words, such as `micro-adam, bf16, micro-batch 2 x 16, checkpointing full`."""
    config = row.config
    words = [named(row.optimizer, row.settings, row.state_dtype), config.precision]
    words += [f"micro-batch {config.batch_size}" + (f" x {config.grad_accum}" if config.grad_accum > 1 else "")]
    words += [f"{config.gpus} GPUs {config.sharding}"] if config.gpus > 1 else []
    words += [f"checkpointing {config.checkpointing}"] if config.checkpointing != "none" else []
    words += [f"{config.fused_loss} loss"] if config.fused_loss != "none" else []
    words += ["step in backward"] if config.step_in_backward else []
    return ", ".join(words)


def named(optimizer: str, settings: Mapping[str, object], state_dtype: str | None) -> str:
    """An optimizer with its settings, such as `adamw (rounding=kahan) with state in float32`."""
    inner = " ".join(f"{name}={value}" for name, value in settings.items())
    return f"{optimizer}{f' ({inner})' if inner else ''}{f' with state in {state_dtype}' if state_dtype else ''}"
