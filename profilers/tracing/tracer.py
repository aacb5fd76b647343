"""Watches every operation of a step on tensors without contents and records the memory it would take on a GPU.

Source: `torch.utils._python_dispatch.TorchDispatchMode`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from optplan.planner.errors import ConfigError
from optplan.planner.timeline import Category
from optplan.profilers.tracing.accumulation import overwritten
from optplan.profilers.tracing.kernels import AFTERWARDS, KERNELS, Call
from optplan.profilers.tracing.recorder import Recorder
from optplan.profilers.tracing.scopes import Scopes
from optplan.profilers.tracing.workspaces import Workspaces

aten = torch.ops.aten

_EXISTENCE = {aten.any.default, aten.any.dim, aten.any.dims}


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the memory of all operations run within it.

    Questions about contents that a module asks with `.all()` are answered yes, with `.any()` no: nothing is masked,
    nothing is infinite. Any other value that Python would read off the GPU cannot be had.
    """

    def __init__(
        self,
        recorder: Recorder,
        scopes: Scopes,
        *,
        capability: tuple[int, int],
        resident_threads: int,
        hides_tokens: bool = False,
    ) -> None:
        """Record to `recorder`.

        Args:
            scopes: Knows which module is running.
            capability: Compute capability of the simulated GPU.
            resident_threads: Threads that it holds at once.
            hides_tokens: Whether a padding mask hides tokens, so that `.all()` is answered no.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._hides_tokens = hides_tokens
        self._recorder = recorder
        self._scopes = scopes
        self._resident_threads = resident_threads
        self._capability = capability
        self._workspaces = Workspaces(recorder, capability)
        self._last_is_existence = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and record it."""
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].device.type == "meta":
            return self._answer(args[0])
        node = None if torch.is_grad_enabled() else torch._C._current_autograd_node()
        target = overwritten(func, args, node)
        kernel = KERNELS.get(func)
        if kernel is not None:
            category, name = self._describe(func, node)
            return kernel(self._call(func, args, kwargs, category, name))
        out = func(*args, **kwargs)
        if target is None or not self._recorder.inherit(target, out):
            self._record(func, args, node, out)
        afterwards = AFTERWARDS.get(func)
        if afterwards is not None:
            category, name = self._describe(func, node)
            afterwards(self._call(func, args, kwargs, category, name))
        return out

    def _call(self, func: Any, args: Any, kwargs: Any, category: Category, name: str) -> Call:
        return Call(
            self._recorder, func, args, kwargs, category, name, self._resident_threads, capability=self._capability
        )

    def _record(self, func: Any, args: Any, node: Any, out: Any) -> None:
        self._last_is_existence = func in _EXISTENCE
        if isinstance(out, torch.Tensor):
            if not self._recorder.knows(out):
                self._recorder.track(out, *self._describe(func, node))
        elif isinstance(out, list | tuple):
            category, name = self._describe(func, node)
            for part in out:
                if isinstance(part, torch.Tensor):
                    self._recorder.track(part, category, name)
        self._workspaces.serve(func, args)

    def _describe(self, func: Any, node: Any) -> tuple[Category, str]:
        """What the results of an operation are for, and their name."""
        if self._recorder.phase in ("step", "clip"):
            return "optimizer_temporaries", func.__name__.partition(".")[0].strip("_")
        operation = func.__name__.partition(".")[0].strip("_")
        if node is None:
            scope = self._scopes.current
            if func is aten._to_copy.default and self._scopes.in_head:
                # What goes into the head, cast by autocast, is no logit yet.
                return "activations", f"{scope.path} {operation}"
            return scope.category, f"{scope.path} {operation}".lstrip()
        scope = self._scopes.of_node(node)
        return scope.category, f"{scope.path} {operation} (backward)".lstrip()

    def _answer(self, tensor: torch.Tensor) -> Any:
        if tensor.dtype == torch.bool:
            return not (self._last_is_existence or self._hides_tokens)
        where = self._scopes.current.path or "the step"
        raise ConfigError(
            f"{where} reads a number off the GPU ({str(tensor.dtype).removeprefix('torch.')}), and a trace has none; "
            f"a step whose memory depends on values cannot be traced"
        )
