"""Watches a sharded step: collectives move nothing, and the runtime's own memory has its own names."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from optplan.planner.timeline import Category
from optplan.profilers.tracing.sharded_world import World
from optplan.profilers.tracing.tracer import Tracer

aten = torch.ops.aten


class ShardedTracer(Tracer):  # type: ignore[no-untyped-call]
    """Records the operations of one rank."""

    def __init__(self, world: World, *args: Any, **kwargs: Any) -> None:
        """Record as a `Tracer` does, which takes the other arguments."""
        super().__init__(*args, **kwargs)
        self._world = world

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and record it."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does to its part of the tensor comes back here
        if func.namespace == "c10d":
            return args[0], _finished_work()
        if func is aten.copy_.default and args[0].device.type == "cpu" and args[1].device.type == "meta":
            return args[0]  # DDP reads back what it has just sent to the others: it stays as it was
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _describe(self, func: Any, node: Any) -> tuple[Category, str]:
        return self._world.label or self._of_stream() or super()._describe(func, node)

    def _of_stream(self) -> tuple[Category, str] | None:
        return ("communication", "cast for communication") if self._recorder.stream else None


def _finished_work() -> Any:
    from torch._C._distributed_c10d import FakeWork, Work

    return Work.boxed(FakeWork())
