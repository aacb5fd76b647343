"""What one micro-step asks of the host: counted while the real module is traced as on a GPU.

The counts are those of a GPU, whatever machine counts: calls of torch are counted where Python makes them
(`TorchFunctionMode`), so that fused attention is one, however a device takes it apart; below them are counted the
operations that CUDA runs (`Tracer`), without those that only look at memory in another way or claim it.

Source: `torch/overrides.py`, `torch/utils/_python_dispatch.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from optplan.planner.host_work import HostCalls
from optplan.planner.models.spec import ModelSpec
from optplan.planner.step.options import StepOptions
from optplan.profilers.tracing.scopes import Scopes
from optplan.profilers.tracing.steps import Device, StepTracer
from optplan.profilers.tracing.tracer import Tracer
from optplan.profilers.workloads.catalogue import build_subject
from optplan.profilers.workloads.subject import Subject

aten = torch.ops.aten

_READS = (aten._local_scalar_dense.default,)
_CLAIMS = ("empty", "new_empty", "_unsafe_view")
"""Beginnings of the names of operations that launch nothing though their results are no views by their schema."""


def count_host_calls(spec: ModelSpec, options: StepOptions) -> HostCalls:
    """Count one micro-step of a model, the first, in which gradients are made rather than added to.

    Raises:
        ConfigError: The model cannot be built or traced.
    """
    autocast = options.autocast_dtype
    step = _CountingStep(
        build_subject(spec, options),
        Device(options.compute_capability, hides_tokens=options.padding_mask),
        autocast=getattr(torch, autocast) if autocast else None,
    )
    with step.tracing():
        step.place()
        step.counts.clear()
        step.micro_step()
    return HostCalls(**step.counts)


class _CountingStep(StepTracer):
    """A traced step that counts."""

    def __init__(self, subject: Subject, device: Device, *, autocast: torch.dtype | None) -> None:
        super().__init__(subject, device, autocast=autocast)
        self.counts: Counter[str] = Counter()
        self._scopes = _CountingScopes(subject.module, subject.head, self.counts)

    def _make_tracer(self) -> Tracer:
        return _CountingTracer(self.recorder, self._scopes, **self._tracer_arguments()).counting(self.counts)

    def _run_module(self) -> torch.Tensor:
        with _PythonCalls(self.counts):
            loss = super()._run_module()
        counted = self.counts.copy()
        nodes = list(_nodes(loss))
        kept = sum(map(_num_kept, nodes))
        self.counts.clear()
        self.counts.update(counted, nodes=len(nodes), kept=kept)
        return loss


class _CountingScopes(Scopes):
    """Counts calls of modules."""

    def __init__(self, model: nn.Module, head: nn.Module | None, counts: Counter[str]) -> None:
        super().__init__(model, head)
        self._counts = counts

    def _enter(self, module: nn.Module) -> None:
        self._counts["modules"] += 1
        super()._enter(module)


class _CountingTracer(Tracer):  # type: ignore[no-untyped-call]
    """Counts launches, of autograd's nodes apart from others, and reads off the GPU."""

    def counting(self, counts: Counter[str]) -> Tracer:
        """Count there."""
        self._counts = counts
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and run one operation."""
        if func in _READS:
            self._counts["waits"] += args[0].device.type == "meta"
        elif _launches(func):
            is_forward = torch.is_grad_enabled() or torch._C._current_autograd_node() is None
            self._counts["launches" if is_forward else "backward_launches"] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


class _PythonCalls(TorchFunctionMode):
    """Counts calls of torch from Python that return tensors; reading an attribute is none."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self._counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and count one call."""
        out = func(*args, **(kwargs or {}))
        parts = out if isinstance(out, tuple | list) else (out,)
        is_call = getattr(func, "__name__", "") != "__get__"
        self._counts["calls"] += is_call and any(isinstance(part, torch.Tensor) for part in parts)
        return out


def _launches(func: Any) -> bool:
    """Whether an operation launches a kernel: neither a view nor memory that nothing is written to."""
    returns = func._schema.returns
    views = [part.alias_info is not None and not part.alias_info.is_write for part in returns]
    return not func.__name__.startswith(_CLAIMS) and not (returns and all(views))


def _nodes(loss: torch.Tensor) -> Iterator[Any]:
    """The nodes that the loss's backward runs."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [after for after, _ in node.next_functions]


def _num_kept(node: Any) -> int:
    """Tensors that a node keeps."""
    if hasattr(node, "saved_tensors"):
        return sum(tensor is not None for tensor in node.saved_tensors)
    total = 0
    for name in dir(node):
        if name.startswith("_saved_"):
            found = getattr(node, name)
            parts = found if isinstance(found, tuple) else (found,)
            total += sum(isinstance(part, torch.Tensor) for part in parts)
    return total
