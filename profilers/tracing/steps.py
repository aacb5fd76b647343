"""Runs training steps on tensors without contents, phase by phase, and keeps what was recorded in pieces.

A training run is made of few distinct pieces: the model's placement, the very first micro-step, micro-steps that find
gradients, clipping, the optimizer's first step and later ones. Each is run once; `optplan.profilers.tracing.runs`
strings them together.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import msgspec
import torch
from torch import nn

from optplan.planner.step.attention import Backend
from optplan.planner.timeline import Phase, Timeline
from optplan.profilers.tracing.attention import Chooser
from optplan.profilers.tracing.composites import as_on_cuda
from optplan.profilers.tracing.cuda_environment import cuda_environment
from optplan.profilers.tracing.recorder import Recorder
from optplan.profilers.tracing.scaling import TracedScaler
from optplan.profilers.tracing.scopes import Scopes
from optplan.profilers.tracing.tracer import Tracer
from optplan.profilers.tracing.triton_launches import without_launches
from optplan.profilers.workloads.subject import Subject, placed_tensors


class Device(msgspec.Struct, frozen=True):
    """The GPU that is simulated, and what is known of the contents.

    Attributes:
        capability: Compute capability; it decides the attention kernel and the size of cuBLAS' workspaces.
        resident_threads: Threads that the whole GPU holds at once; they decide how sums are split.
        hides_tokens: Whether the inputs hold a padding mask that hides tokens.
    """

    capability: tuple[int, int] = (9, 0)
    resident_threads: int = 132 * 2048
    hides_tokens: bool = False


@contextmanager
def collected_by_piece() -> Iterator[None]:
    """Within the context cycles are looked for at the end of each piece alone, and among what is new alone.

    Python looks for them whenever it has made many objects; memory that a cycle held would end at a random operation,
    or in a piece that knows nothing of it.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


class StepTracer:
    """A subject at work on a simulated device.

    Attributes:
        subject: What is trained.
        recorder: Where everything is recorded.
        updated: What the optimizer updates, by name: the parameters, or their master weights.
        used_up: Ids of the gradients that were used up as they came, by the parameter's name.
        scaler: Scales the loss, where the lower dtype of autocast is fp16.
    """

    def __init__(
        self,
        subject: Subject,
        device: Device,
        *,
        autocast: torch.dtype | None = None,
        master: torch.dtype | None = None,
    ) -> None:
        """Prepare; nothing is recorded yet.

        Args:
            autocast: Lower dtype of autocast around the forward, None without it.
            master: Dtype of the master weights, None without them.
        """
        self.subject = subject
        self.recorder = Recorder()
        self.updated: dict[str, nn.Parameter] = subject.trainable()
        self.scaler = TracedScaler() if autocast == torch.float16 else None
        self.used_up: dict[str, int] = {}
        self._device = device
        self._chooser = Chooser(device.capability)
        self._autocast = autocast
        self._master = master
        self._scopes = Scopes(subject.module, subject.head)

    def trained(self) -> dict[str, nn.Parameter]:
        """What has gradients when the optimizer steps, by name."""
        return self.subject.trainable()

    @property
    def where(self) -> str:
        """The module entered last."""
        return self._scopes.innermost

    @property
    def attention(self) -> list[Backend]:
        """The attention kernels chosen so far."""
        return self._chooser.chosen

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Record what is run within the context."""
        tracer = self._make_tracer()
        with ExitStack() as stack:
            stack.enter_context(collected_by_piece())
            stack.enter_context(cuda_environment())
            stack.enter_context(without_launches())
            stack.enter_context(self.subject.context())
            stack.enter_context(as_on_cuda(self._chooser))
            stack.enter_context(self._scopes.following())
            stack.enter_context(tracer)
            yield

    def _make_tracer(self) -> Tracer:
        return Tracer(self.recorder, self._scopes, **self._tracer_arguments())

    def _tracer_arguments(self) -> dict[str, Any]:
        return {
            "capability": self._device.capability,
            "resident_threads": self._device.resident_threads,
            "hides_tokens": self._device.hides_tokens,
        }

    def place(self) -> slice:
        """Place the module, its master weights and its inputs on the device."""
        with self._piece("load") as piece:
            for name, tensor in placed_tensors(self.subject.module):
                self.recorder.track(tensor, "parameters", name)
            if self._master is not None:
                self.updated = {name: self._master_of(name, p) for name, p in self.updated.items()}
            for name, value in self.subject.inputs.items():
                if isinstance(value, torch.Tensor):
                    self.recorder.track(value, "activations", name)
        return piece()

    def _master_of(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        master = nn.Parameter(parameter.detach().to(self._master))
        self.recorder.label(master, "master_weights", f"{name} master")
        return master

    def micro_step(self) -> slice:
        """Forward and backward once."""
        with self._piece("forward") as piece:
            loss = self._forward()
            self.recorder.phase = "backward"
            self._scopes.begin_backward()
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
        self._name_gradients()
        return piece()

    def _name_gradients(self) -> None:
        for name, parameter in self.subject.trainable().items():
            if parameter.grad is not None:
                self.recorder.label(parameter.grad, "gradients", f"{name} gradient")

    @contextmanager
    def using_gradients_up(self) -> Iterator[None]:
        """Within the context each gradient ends as soon as it is there, as if its parameter's step were taken."""
        hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._use_up, name))  # type: ignore[no-untyped-call]
            for name, parameter in self.subject.trainable().items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _use_up(self, name: str, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self.recorder.label(parameter.grad, "gradients", f"{name} gradient")
        self.used_up[name] = self.recorder.id_of(parameter.grad)
        parameter.grad = None

    def _forward(self) -> torch.Tensor:
        context: AbstractContextManager[Any] = nullcontext()
        if self._autocast is not None:
            context = torch.autocast("cuda", self._autocast)
        with context:
            loss = self._run_module()
        return loss if self.scaler is None else self.scaler.scaled(loss)

    def _run_module(self) -> torch.Tensor:
        return self.subject.loss(self.subject.module, self.subject.inputs)

    def optimizer_step(self, optimizer: torch.optim.Optimizer) -> slice:
        """The optimizer's step; with master weights the gradients are copied in their dtype first."""
        with self._piece("step") as piece:
            if self._master is not None:
                trained = self.trained()
                for name, master in self.updated.items():
                    gradient = trained[name].grad
                    master.grad = None if gradient is None else gradient.to(self._master)
                    del gradient
            if self.scaler is None:
                optimizer.step()
            else:
                self.scaler.step(optimizer)
            if self._master is not None:
                for master in self.updated.values():
                    master.grad = None
        return piece()

    def run(self, phase: Phase, action: Callable[[], Any]) -> slice:
        """Run something as a phase of its own."""
        with self._piece(phase) as piece:
            action()
        return piece()

    def timeline(self, piece: slice) -> Timeline:
        """What a piece recorded."""
        return self.recorder.timeline(piece.start, piece.stop)

    @contextmanager
    def _piece(self, phase: Phase) -> Iterator[Callable[[], slice]]:
        start = len(self.recorder.events)
        self.recorder.phase = phase
        yield lambda: slice(start, len(self.recorder.events))
        gc.collect()
