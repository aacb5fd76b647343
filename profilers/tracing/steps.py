"""Runs training steps on tensors without contents, phase by phase, and keeps what was recorded in pieces.

A training run is made of few distinct pieces: the model's placement, the very first micro-step, micro-steps that find
gradients or not, the optimizer's first step and later ones. Each is run once; `optplan.profilers.tracing.runs` strings them
together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import msgspec
import torch

from optplan.planner.timeline import Phase, Timeline
from optplan.profilers.tracing.composites import as_on_cuda
from optplan.profilers.tracing.cuda_environment import cuda_environment
from optplan.profilers.tracing.recorder import Recorder
from optplan.profilers.tracing.scopes import Scopes
from optplan.profilers.workloads.subject import Subject, placed_tensors
from optplan.profilers.tracing.tracer import Tracer


class Device(msgspec.Struct, frozen=True):
    """The GPU that is simulated.

    Attributes:
        capability: Compute capability; it decides the attention kernel and the size of cuBLAS' workspaces.
        resident_threads: Threads that the whole GPU holds at once; they decide how sums are split.
    """

    capability: tuple[int, int] = (9, 0)
    resident_threads: int = 132 * 2048


class StepTracer:
    """A subject at work on a simulated device.

    Attributes:
        subject: What is trained.
        recorder: Where everything is recorded.
    """

    def __init__(
        self,
        subject: Subject,
        device: Device,
        *,
        autocast: torch.dtype | None = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Prepare; nothing is recorded yet.

        Args:
            autocast: Lower dtype of autocast around the forward, None without it.
            progress: Told what is being traced.
        """
        self.subject = subject
        self.recorder = Recorder()
        self.device = device
        self._autocast = autocast
        self._progress = progress
        self._scopes = Scopes(subject.module, subject.head)

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Record what is run within the context."""
        tracer = Tracer(
            self.recorder,
            self._scopes,
            capability=self.device.capability,
            resident_threads=self.device.resident_threads,
        )
        with ExitStack() as stack:
            stack.enter_context(cuda_environment())
            stack.enter_context(as_on_cuda(self.device.capability))
            stack.enter_context(self._scopes.following())
            stack.enter_context(tracer)
            yield

    def place(self) -> slice:
        """Place the module and its inputs on the device."""
        with self._piece("load") as piece:
            for name, tensor in placed_tensors(self.subject.module):
                self.recorder.track(tensor, "parameters", name)
            for name, value in self.subject.inputs.items():
                if isinstance(value, torch.Tensor):
                    self.recorder.track(value, "activations", name)
        return piece()

    def micro_step(self) -> slice:
        """Forward and backward once."""
        self._progress("forward")
        with self._piece("forward") as piece:
            loss = self._forward()
            self._progress("backward")
            self._enter("backward")
            self._scopes.begin_backward()
            loss.backward()
            del loss
        for name, parameter in self.subject.trainable().items():
            if parameter.grad is not None:
                self.recorder.label(parameter.grad, "gradients", f"{name} gradient")
        return piece()

    def _forward(self) -> torch.Tensor:
        context: AbstractContextManager[Any] = nullcontext()
        if self._autocast is not None:
            context = torch.autocast("cuda", self._autocast)
        with context:
            return self.subject.loss(self.subject.module, self.subject.inputs)

    def run(self, phase: Phase, action: Callable[[], Any]) -> slice:
        """Run something as a phase of its own."""
        with self._piece(phase) as piece:
            action()
        return piece()

    def timeline(self, piece: slice) -> Timeline:
        """What a piece recorded."""
        return self.recorder.timeline(piece.start, piece.stop)

    def _enter(self, phase: Phase) -> None:
        self.recorder.phase = phase

    @contextmanager
    def _piece(self, phase: Phase) -> Iterator[Callable[[], slice]]:
        start = len(self.recorder.events)
        self._enter(phase)
        yield lambda: slice(start, len(self.recorder.events))
