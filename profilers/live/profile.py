"""Measuring a training loop as it runs: its phases, one steady step event by event, its times.

Until the recorded step has ended the allocator's own record is kept and the modules are followed; the steps after it
run as they would without being watched, but for the clock's note at each change of the phase, and are timed. Where
enough of them are left, the first does not count: it begins with nothing waiting on the GPU, whose work ended while the
record was read, and the host may still clean up after it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import torch
from torch import nn

from optplan.planner.history.events import DeviceHistory
from optplan.planner.measured.measurement import OutOfMemory
from optplan.planner.records import ResidentBytes
from optplan.planner.step_history import StepHistory
from optplan.planner.timeline import Phase
from optplan.profilers.live.allocator_record import AllocatorRecord, ReplayedRecord, replay_record
from optplan.profilers.live.communication import (
    CommunicationFollower,
    GradientNames,
    bucket_sizes,
    inner_model,
    strategy_of,
)
from optplan.profilers.live.live_history import Communication, Ownership, phase_peaks, step_history
from optplan.profilers.live.owners import Owner, Owners, parts_of, storage_bytes
from optplan.profilers.live.phases import ModuleFollower, StepWatcher
from optplan.profilers.live.step_clock import StepClock

RECORDED_STEP = 2
"""The third step: the first makes the optimizer's state, the second finds the memory that the first has left."""

MAX_TIMED_STEPS = 1000
"""After so many a loop is no longer timed: nothing that grows is kept of one that goes on for days."""

MIN_TIMED_STEPS = 3
"""The first step after the recorded one counts unless at least so many are left without it."""

_MESSAGE_LIMIT = 400
_ROUNDING_BYTES = 512


class Residents(NamedTuple):
    """What lives across the step, unrounded, and the state's bytes by name."""

    bytes: ResidentBytes
    state_tensors: dict[str, int]


class Call(NamedTuple):
    """How the model was called in the recorded step, or in the last one begun before it.

    Attributes:
        shapes: Shapes of the tensors given to its forward.
        autocast: Dtype of autocast around it, None without.
        num_forwards: Forwards since the step began.
    """

    shapes: tuple[torch.Size, ...]
    autocast: torch.dtype | None
    num_forwards: int


class LiveProfile:
    """One training loop under observation.

    Attributes:
        residents: What lives across the step, None before the first step.
        history: The recorded step, None without allocator figures or before its end.
        phase_peaks: Most bytes allocated in each of its phases.
        peak_requested_bytes: Most bytes asked for at once in it, before the allocator rounds.
        call: How the model was called, None before the first step.
        hook_seconds: Time that observing took on the host in the steps after the recorded one.
        out_of_memory: How the loop ended, if the memory did not suffice.
        first_difference: Where the record could not be followed exactly, None if nowhere.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, recorded_step: int = RECORDED_STEP
    ) -> None:
        """Prepare to observe.

        Args:
            model: Its forward begins each step. It must be on the device on which it is trained.
            optimizer: Its `step()` ends each step.
            recorded_step: Which step is recorded, counted from 0.
        """
        inner = inner_model(model)
        self.device = next(model.parameters()).device
        self.residents: Residents | None = None
        self.history: StepHistory | None = None
        self.phase_peaks: dict[Phase, int] = {}
        self.peak_requested_bytes: int | None = None
        self.out_of_memory: OutOfMemory | None = None
        self.first_difference: str | None = None
        self.call: Call | None = None
        self.hook_seconds = 0.0
        self.recorded_step = recorded_step
        self._model = model
        self._owners = Owners(inner, optimizer, name_gradient=GradientNames(model))
        self._record = AllocatorRecord(self.device.index or 0) if self.device.type == "cuda" else None
        self._clock = StepClock(self.device)
        self._watcher = StepWatcher(model, optimizer)
        count = self._record.count if self._record else lambda: 0
        self._follower = ModuleFollower(inner, count_events=count)
        self._communication = CommunicationFollower(inner, count_events=count)
        self._ownerships: list[Ownership] = []
        self._recording = False
        self._gradient_bytes = 0

    @contextlib.contextmanager
    def observing(self, *, num_moments: int = 0) -> Iterator[None]:
        """Observe within the context; an error of the loop goes on, running out of memory is noted before.

        Args:
            num_moments: How often a phase will begin in the steps to be timed, where that is known.
        """
        self._clock.prepare(num_moments)
        try:
            with self._watcher.watching(self._phase_begins):
                yield
        except torch.cuda.OutOfMemoryError as error:
            self._ran_out(error)
            raise
        finally:
            if self._recording:
                self._end_record()
            self._stop_following()

    def finish_step(self) -> None:
        """Say that the step is over, gradients freed and all; the next forward would say so too."""
        if self._recording and self._watcher.phase == "zero":
            self._end_record()

    @property
    def num_steps(self) -> int:
        """Optimizer steps finished."""
        return self._watcher.num_steps

    def phase_seconds(self) -> dict[Phase, float]:
        """Median time by phase of the steps that are timed."""
        return self._clock.seconds(self._timed_steps())

    def step_seconds(self) -> list[float]:
        """Time of each step that is timed, from forward to the end of the optimizer's step.

        Of four steps or more after the recorded one the first is left out.
        """
        return self._clock.step_seconds(self._timed_steps())

    def clocked_seconds(self) -> list[float]:
        """The same of every step after the recorded one."""
        return self._clock.step_seconds(self._clocked_steps())

    def _timed_steps(self) -> range:
        clocked = self._clocked_steps()
        return clocked[1:] if len(clocked) > MIN_TIMED_STEPS else clocked

    def _clocked_steps(self) -> range:
        first = self.recorded_step + 1
        return range(first, min(self.num_steps, first + MAX_TIMED_STEPS))

    @property
    def watcher(self) -> StepWatcher:
        """What tells the phases; a trainer that does not call its model may tell it of a forward."""
        return self._watcher

    @property
    def has_masters(self) -> bool:
        """Whether the optimizer steps copies of the model's parameters."""
        return bool(self._owners.masters)

    def _phase_begins(self, before: Phase, phase: Phase) -> None:
        # What follows an optimizer's step, its `zero_grad` above all, still belongs to the step that it ends.
        step = self.num_steps - (phase == "zero")
        if step <= self.recorded_step:
            self._take_note(before, phase)
        elif step <= self.recorded_step + MAX_TIMED_STEPS:
            if self._recording:
                self._end_record()
            begin = time.perf_counter()
            self._clock.note(step, phase)
            self.hook_seconds += time.perf_counter() - begin

    def _take_note(self, before: Phase, phase: Phase) -> None:
        begins_step = phase == "forward" and before == "zero"
        if begins_step and self._recording:
            self._end_record()
        if phase == "forward":
            self._note_call(begins_step)
        if phase == "step":
            self._gradient_bytes = storage_bytes((t for t, _ in self._owners.gradients()), self.device)
        if phase == "zero":
            self._note_residents()
        if begins_step:
            self._begin_record()
        elif self._recording and phase in ("step", "zero"):
            self._note_owners()
        if self._recording:
            self._follower.enter(phase)

    def _note_call(self, begins_step: bool) -> None:
        shapes = tuple(tensor.shape for tensor in self._watcher.inputs)
        kind = self.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        earlier = 0 if begins_step or self.call is None else self.call.num_forwards
        self.call = Call(shapes, autocast, earlier + 1)

    def _begin_record(self) -> None:
        self._follower.marks.clear()
        self._ownerships.clear()
        if self._record is not None:
            self._record.start()
        self._recording = True
        self._note_owners()
        self._follower.start(on_logits=self._note_logits)
        if self._record is not None:
            self._communication.start(on_reduction=self._note_reduction)

    def _end_record(self) -> None:
        self._recording = False
        self._stop_following()
        if self._record is None:
            return
        recorded = self._record.stop()
        if self.num_steps > self.recorded_step or self.out_of_memory is not None:
            self._read(recorded)

    def _read(self, history: DeviceHistory) -> None:
        replayed = replay_record(history)
        self.first_difference = replayed.first_difference
        if self.out_of_memory is not None:
            failed = replayed.failed_request_bytes
            self.out_of_memory = msgspec.structs.replace(self.out_of_memory, requested_bytes=failed)
        self.history = self._named(replayed)
        self.phase_peaks = phase_peaks(self._follower.marks, replayed.allocated)
        self.peak_requested_bytes = replayed.peak_requested_bytes

    def _named(self, record: ReplayedRecord) -> StepHistory:
        return step_history(
            record.events,
            allocated=record.allocated,
            start=record.start,
            marks=self._follower.marks,
            ownerships=self._ownerships,
            reserved_bytes=record.reserved_bytes,
            communication=Communication(
                self._communication.ranges,
                has_streams=strategy_of(self._model) == "fsdp2",
                bucket_sizes=frozenset(map(_block_bytes, bucket_sizes(self._model))),
            ),
        )

    def _stop_following(self) -> None:
        self._follower.stop()
        self._communication.stop()

    def _note_reduction(self, group: Any) -> None:
        """Whole gradients, which only FSDP2 knows, before they are reduced."""
        if self._record is not None:
            owners = {}
            for parameter in group.fsdp_params:
                whole = getattr(parameter, "_unsharded_param", None)
                if whole is not None and whole.grad is not None:
                    address = whole.grad.untyped_storage().data_ptr()
                    owners[address] = Owner("gradients", f"{parameter._param_fqn} gradient")
            self._ownerships.append(Ownership(self._record.count(), owners))

    def _note_logits(self, place: str, logits: torch.Tensor) -> None:
        """What the output head returns; what it allocates besides, weights cast by autocast above all, is none."""
        if self._record is not None:
            owner = Owner("logits_and_loss", f"{place} {self._watcher.phase}")
            owners = {part.untyped_storage().data_ptr(): owner for part in parts_of(logits)}
            self._ownerships.append(Ownership(self._record.count(), owners))

    def _note_owners(self) -> None:
        if self._record is not None:
            owners = self._owners.by_address(self.device)
            for tensor in self._watcher.inputs:
                owners.setdefault(tensor.untyped_storage().data_ptr(), Owner("activations", "inputs"))
            self._ownerships.append(Ownership(self._record.count(), owners))

    def _note_residents(self) -> None:
        state: dict[str, list[torch.Tensor]] = {}
        for tensor, _, key in self._owners.state():
            state.setdefault(key, []).append(tensor)
        by_name = {key: storage_bytes(iter(tensors), self.device) for key, tensors in state.items()}
        self.residents = Residents(
            ResidentBytes(
                parameters=storage_bytes(iter(self._owners.parameters.values()), self.device),
                gradients=self._gradient_bytes,
                master_weights=storage_bytes(iter(self._owners.masters.values()), self.device),
                optimizer_state=storage_bytes((t for ts in state.values() for t in ts), self.device),
            ),
            {key: size for key, size in by_name.items() if size},
        )

    def _ran_out(self, error: BaseException) -> None:
        if self._recording:
            self._note_owners()
        self.out_of_memory = out_of_memory(error, self._watcher.phase, self.device)


def out_of_memory(error: BaseException, phase: Phase, device: torch.device) -> OutOfMemory:
    """What is known of a failed request when its error arrives."""
    return OutOfMemory(phase, None, torch.cuda.memory_allocated(device), " ".join(str(error).split())[:_MESSAGE_LIMIT])


def _block_bytes(size: int) -> int:
    """What the allocator hands out for a request."""
    return -(-size // _ROUNDING_BYTES) * _ROUNDING_BYTES
