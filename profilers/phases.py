"""Where a training step is: which phase, which module, and how many allocator events have gone by.

Phases are told by hooks that training code does not notice: the model's forward, torch's entry into backward, the
optimizer's step. A phase lasts until the next one begins:

    forward   from the call of the model that follows an optimizer step (or the beginning)
    backward  from `backward()`
    clip      from the end of the last backward, once anything is allocated or freed before the optimizer's step
    step      from the optimizer's `step()`
    zero      from its end to the next forward

With gradient accumulation the phases of the micro-steps repeat within one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from optplan.planner.timeline import Phase


class Mark(NamedTuple):
    """From allocator event `event` on (counted from 0), the step is in this phase and this module.

    Attributes:
        event: Allocations and frees that had happened when the mark was made.
        phase: Phase that begins or goes on.
        path: Dotted path of the module whose code runs, empty outside the model.
        past_head: Whether the model's output head has been called in this forward.
    """

    event: int
    phase: Phase
    path: str
    past_head: bool


class StepWatcher:
    """Follows the phases of a training loop and, while a step is recorded, the modules.

    Attributes:
        phase: The current phase.
        num_steps: Optimizer steps finished.
        marks: What was noted since `record_modules` was set.
        record_modules: Whether modules are followed too; otherwise only phases.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        count_events: Callable[[], int],
        on_phase: Callable[[Phase, Phase], None],
    ) -> None:
        """Prepare to watch.

        Args:
            model: Whose forward begins a step.
            optimizer: Whose step ends it.
            count_events: Allocations and frees so far.
            on_phase: Called at each change with the old and the new phase, before the work of the new one begins.
        """
        self.phase: Phase = "zero"
        self.num_steps = 0
        self.marks: list[Mark] = []
        self.record_modules = False
        self._model = model
        self._optimizer = optimizer
        self._count_events = count_events
        self._on_phase = on_phase
        self._paths = {module: path for path, module in model.named_modules()}
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        self._head: nn.Module | None = head
        self._past_head = False
        self._stack: list[str] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch within the context; every hook is gone afterwards."""
        handles = [
            self._model.register_forward_pre_hook(self._forward_begins),
            self._optimizer.register_step_pre_hook(lambda *_: self._enter("step")),
            self._optimizer.register_step_post_hook(lambda *_: self._step_ends()),
        ]
        for module in self._paths:
            handles.append(module.register_forward_pre_hook(self._module_begins))
            handles.append(module.register_forward_hook(self._module_ends, always_call=True))
        original = torch.autograd.backward
        torch.autograd.backward = self._wrap_backward(original)
        try:
            yield
        finally:
            torch.autograd.backward = original
            for handle in handles:
                handle.remove()

    def _forward_begins(self, *_: Any) -> None:
        # A model that a checkpointed part calls again in backward is still in backward.
        if self.phase != "backward":
            self._past_head = False
            self._enter("forward")

    def _wrap_backward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def backward(*args: Any, **kwargs: Any) -> Any:
            # Reentrant checkpointing calls backward within backward.
            nested = self.phase == "backward"
            self._enter("backward")
            result = original(*args, **kwargs)
            if not nested:
                self._enter("clip")
            return result

        return backward

    def _step_ends(self) -> None:
        self.num_steps += 1
        self._enter("zero")

    def _enter(self, phase: Phase) -> None:
        if phase != self.phase:
            before, self.phase = self.phase, phase
            self._on_phase(before, phase)
        self._mark("")

    def _module_begins(self, module: nn.Module, _: Any) -> None:
        if self.record_modules:
            self._stack.append(self._paths[module])
            self._past_head |= module is self._head
            self._mark(self._stack[-1])

    def _module_ends(self, module: nn.Module, _: Any, output: Any) -> None:
        if not self.record_modules or not self._stack:
            return
        path = self._stack.pop()
        self._mark(self._stack[-1] if self._stack else "")
        for tensor in _tensors_of(output):
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(self._backward_marker(path))

    def _backward_marker(self, path: str) -> Callable[..., None]:
        """A hook that notes when backward reaches what the module at `path` returned; it keeps no tensor alive."""

        def reached(*_: Any) -> None:
            if self.record_modules:
                self._mark(path)

        return reached

    def _mark(self, path: str) -> None:
        if self.record_modules:
            self.marks.append(Mark(self._count_events(), self.phase, path, self._past_head))


def _tensors_of(output: Any) -> Iterator[torch.Tensor]:
    """The tensors directly in what a module returned."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, dict):
        yield from (value for value in output.values() if isinstance(value, torch.Tensor))
    elif isinstance(output, tuple | list):
        yield from (value for value in output if isinstance(value, torch.Tensor))
