"""Which module's operations are running, forward and backward."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from optplan.planner.timeline import Category


class Scope(NamedTuple):
    """A module's dotted path, and what the memory made there is for."""

    path: str
    category: Category


OUTSIDE = Scope("", "logits_and_loss")
"""What is run outside any module: the loss."""


class Scopes:
    """Follows the modules that are called, and finds an autograd node's module again by its sequence number.

    Every operation that autograd will differentiate takes the next sequence number of its thread, so that the numbers
    between two changes of module belong to one module.
    """

    def __init__(self, model: nn.Module, head: nn.Module | None) -> None:
        """Follow `model`; what runs from its output head `head` on belongs to the loss."""
        self._model = model
        self._paths = {module: path for path, module in model.named_modules()}
        self._head = head
        self._past_head = False
        self._running_head = False
        self._is_backward = False
        self._stack: list[Scope] = []
        self._starts: list[int] = []
        self._scopes: list[Scope] = []
        self.current = OUTSIDE
        self.innermost = ""

    @property
    def in_head(self) -> bool:
        """Whether the output head itself is running."""
        return self._running_head

    def begin_backward(self) -> None:
        """Say that modules called from now on are recomputed ones."""
        self._past_head = False
        self._is_backward = True

    def of_node(self, node: Any) -> Scope:
        """The scope in which an autograd node was made."""
        index = bisect_right(self._starts, node._sequence_nr()) - 1
        return self._scopes[index] if index >= 0 else OUTSIDE

    @contextmanager
    def following(self) -> Iterator[None]:
        """Follow calls of modules within the context."""
        original = nn.Module.__call__
        nn.Module.__call__ = self._wrap(nn.Module._call_impl)  # type: ignore[method-assign]
        self._change(OUTSIDE)
        try:
            yield
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]

    def _wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def call_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self._enter(module)
            try:
                return call(module, *args, **kwargs)
            finally:
                self._leave(module)

        return call_module

    def _enter(self, module: nn.Module) -> None:
        self._stack.append(self.current)
        self._running_head = module is self._head
        self._is_backward &= module is not self._model
        # What follows a recomputed head is its loss up to the next module, which is of another checkpoint.
        self._past_head = self._running_head or (self._past_head and not self._is_backward)
        path = self._paths.get(module, self.current.path)
        self.innermost = path or self.innermost
        self._change(Scope(path, "logits_and_loss" if self._past_head else "activations"))

    def _leave(self, module: nn.Module) -> None:
        outer = self._stack.pop()
        self._running_head = False
        if self._past_head and module is not self._model:
            outer = outer._replace(category="logits_and_loss")
        if module is self._model:
            self._past_head = False
        self._change(outer)

    def _change(self, scope: Scope) -> None:
        self.current = scope
        self._starts.append(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]
        self._scopes.append(scope)
