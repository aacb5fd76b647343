"""Where a training step is: which phase, which module, and how many allocator events have gone by.

Phases are told by hooks that training code does not notice: the model's forward, torch's entry into backward, the
optimizer's step. A phase lasts until the next one begins:

    forward   from the call of the model that follows an optimizer step (or the beginning)
    backward  from `backward()`
    clip      from the end of the last backward, once anything is allocated or freed before the optimizer's step
    step      from the optimizer's `step()`
    zero      from its end to the next forward

With gradient accumulation the phases of the micro-steps repeat within one step.

Nothing here keeps a model or an optimizer alive: what is called back is known only while it is watched, and a graph
knows of its follower weakly. Memory that the caller gives up is free at once, not when garbage is next collected.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from optplan.planner.timeline import Phase

_MARKED = "optplan.profilers.live"


class Mark(NamedTuple):
    """From allocator event `event` on (counted from 0), the step is in this phase and this module.

    Attributes:
        event: Allocations and frees that had happened when the mark was made.
        phase: Phase that begins or goes on.
        path: Dotted path of the module whose code runs, empty outside the model.
        in_loss: Whether that code belongs to the loss: what follows the model's output head.
    """

    event: int
    phase: Phase
    path: str
    in_loss: bool


class StepWatcher:
    """Follows the phases of a training loop.

    Attributes:
        phase: The current phase.
        num_steps: Optimizer steps finished.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Prepare to watch.

        Args:
            model: Whose forward begins a step.
            optimizer: Whose step ends it.
        """
        self.phase: Phase = "zero"
        self.num_steps = 0
        self._given: tuple[Any, ...] = ()
        self._model = model
        self._optimizer = optimizer
        self._on_phase: Callable[[Phase, Phase], None] = _tell_nobody

    @contextmanager
    def watching(self, on_phase: Callable[[Phase, Phase], None]) -> Iterator[None]:
        """Watch within the context; every hook is gone afterwards.

        Args:
            on_phase: Called at each change with the old and the new phase, before the work of the new one begins.
        """
        self._on_phase = on_phase
        handles = [
            # Before FSDP2's own hook, which gathers the root's parameters: they belong to the step that begins.
            self._model.register_forward_pre_hook(self._forward_begins, prepend=True, with_kwargs=True),
            self._optimizer.register_step_pre_hook(lambda *_: self._enter("step")),
            self._optimizer.register_step_post_hook(lambda *_: self.end_step()),
        ]
        original = torch.autograd.backward
        torch.autograd.backward = self._wrap_backward(original)
        try:
            yield
        finally:
            torch.autograd.backward = original
            self._on_phase = _tell_nobody
            for handle in handles:
                handle.remove()

    @property
    def inputs(self) -> list[torch.Tensor]:
        """What the model is called with; known only while a forward begins."""
        return [tensor for value in self._given for tensor in _tensors_of(value)]

    def begin_forward(self, *inputs: Any) -> None:
        """Say that a forward begins; the model's own call says so by itself."""
        # A model that a checkpointed part calls again in backward is still in backward.
        if self.phase != "backward":
            self._given = inputs
            self._enter("forward")
            self._given = ()

    def _forward_begins(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.begin_forward(args, kwargs)

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

    def end_step(self) -> None:
        """Say that an optimizer's step has ended; the optimizer itself says so by itself."""
        self.num_steps += 1
        self._enter("zero")

    def _enter(self, phase: Phase) -> None:
        if phase != self.phase:
            before, self.phase = self.phase, phase
            self._on_phase(before, phase)


class ModuleFollower:
    """Notes, allocator event by allocator event, which module's operations run, forward and backward.

    Attributes:
        marks: What was noted, in order.
    """

    def __init__(self, model: nn.Module, *, count_events: Callable[[], int]) -> None:
        """Prepare to follow.

        Args:
            model: Whose modules are followed.
            count_events: Allocations and frees so far.
        """
        self.marks: list[Mark] = []
        self._model = model
        self._count_events = count_events
        self._on_logits: Callable[[str, torch.Tensor], None] = _tell_nobody
        self._paths = {module: path for path, module in model.named_modules()}
        find_head: Any = getattr(model, "get_output_embeddings", None)
        self._head: nn.Module | None = find_head() if find_head else None
        self._in_loss = True
        self._stack: list[str] = []
        self._phase: Phase = "forward"
        self._handles: list[Any] = []
        self._on = False

    def start(self, *, on_logits: Callable[[str, torch.Tensor], None]) -> None:
        """Follow from now on; called from a hook of the model's own forward, its children follow.

        Args:
            on_logits: Told the output head's path and what it returns.
        """
        self._on, self._on_logits = True, on_logits
        for module in self._paths:
            if module is not self._model:
                self._handles.append(module.register_forward_pre_hook(self._module_begins))
            self._handles.append(module.register_forward_hook(self._module_ends, always_call=True))

    def stop(self) -> None:
        """Follow no longer; every hook on a module is gone, and those left on a graph do nothing."""
        self._on, self._on_logits = False, _tell_nobody
        while self._handles:
            self._handles.pop().remove()

    def enter(self, phase: Phase) -> None:
        """Note that a phase begins."""
        self._phase = phase
        self._stack.clear()
        # What runs first in a forward is the model's, what runs first in a backward the loss's.
        self._in_loss = phase == "backward"
        self._mark("")

    def _module_begins(self, module: nn.Module, _: Any) -> None:
        self._stack.append(self._paths[module])
        self._mark(self._stack[-1])

    def _module_ends(self, module: nn.Module, _: Any, output: Any) -> None:
        path = self._stack.pop() if self._stack and module is not self._model else self._paths[module]
        is_head = module is self._head
        self._in_loss |= is_head
        self._mark(self._stack[-1] if self._stack else "")
        for tensor in _tensors_of(output):
            if is_head:
                self._on_logits(path, tensor)
            node: Any = tensor.grad_fn
            # What an inner module returned may be returned again by those around it, and is the inner one's.
            if node is not None and _MARKED not in node.metadata:
                node.metadata[_MARKED] = True
                node.register_prehook(self._marker(path, belongs_to_loss=self._in_loss))

    def _marker(self, path: str, *, belongs_to_loss: bool) -> Callable[..., None]:
        """A hook that notes when backward reaches what the module at `path` returned; it keeps nothing alive."""
        known = weakref.ref(self)

        def reached(*_: Any) -> None:
            follower = known()
            if follower is not None and follower._on:
                follower._in_loss = belongs_to_loss
                follower._mark(path)

        return reached

    def _mark(self, path: str) -> None:
        self.marks.append(Mark(self._count_events(), self._phase, path, self._in_loss))


def _tell_nobody(*_: Any) -> None:
    """What is called when nobody watches."""


def _tensors_of(output: Any) -> Iterator[torch.Tensor]:
    """The tensors directly in what a module returned."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, dict):
        yield from (value for value in output.values() if isinstance(value, torch.Tensor))
    elif isinstance(output, tuple | list):
        yield from (value for value in output if isinstance(value, torch.Tensor))
