"""Holds an optimizer's model against the real one: its state by storage, its step's allocations event by event."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel
from optplan.planner.tensors import Parameter
from optplan.planner.timeline import Allocation, Timeline, TimelineBuilder

Event = tuple[str, int]

CUDA_ONLY = ("CUDA ", "cuSOLVER ")
"""How the names of allocations begin that the same operation does not make on the CPU."""


def _in_order(events: Sequence[Event]) -> list[Event]:
    """Drop empty tensors; sort the frees between two allocations, whose order no peak depends on."""
    ordered: list[Event] = []
    frees: list[Event] = []
    for event in events:
        if event[1] and event[0] == "free":
            frees.append(event)
        elif event[1]:
            ordered += [*sorted(frees), event]
            frees = []
    return ordered + sorted(frees)


def _model_events(model: OptimizerModel, parameters: Sequence[Parameter], context: OptimizerContext) -> list[Event]:
    builder = TimelineBuilder("step")
    model.write_step(builder, parameters, context)
    made = {event.id: event for event in builder.events if isinstance(event, Allocation)}
    sizes = {id_: event.bytes for id_, event in made.items() if not event.name.startswith(CUDA_ONLY)}
    return _in_order(
        [
            ("alloc" if isinstance(event, Allocation) else "free", sizes[event.id])
            for event in builder.events
            if event.id in sizes
        ]
    )


def peak_bytes(timeline: Timeline) -> int:
    """Most bytes alive at once; every allocation must have its end."""
    alive: dict[int, int] = {}
    peak = 0
    for event in timeline:
        if isinstance(event, Allocation):
            alive[event.id] = event.bytes
            peak = max(peak, sum(alive.values()))
        else:
            del alive[event.id]
    assert not alive
    return peak


def _step_peak(model: OptimizerModel, parameters: Sequence[Parameter], context: OptimizerContext) -> int:
    builder = TimelineBuilder("step")
    model.write_step(builder, parameters, context)
    return peak_bytes(builder.events)


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every tensor within a state value, with its dotted name: lists, projector objects, quantized subclasses."""
    import torch

    if isinstance(value, torch.Tensor):
        parts = getattr(value, "tensor_attrs", ())
        if not parts:
            yield name, value
        for part in parts:
            yield f"{name}.{part}", getattr(value, part)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _tensors(item, f"{name}.{number}")
    elif hasattr(value, "__dict__"):
        for key, item in vars(value).items():
            yield from _tensors(item, f"{name}.{key}")


def _state_of(optimizer: Any, parameter: Any) -> dict[str, Any]:
    return {
        part: tensor for name, value in optimizer.state[parameter].items() for part, tensor in _tensors(value, name)
    }


def _real_events(optimizer: Any, parameters: Sequence[Any], *, step: int = 3) -> list[Event]:
    """Allocations and frees of one step of a torch optimizer, as a dispatch mode sees storages come and go."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class StorageTrace(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.events: list[Event] = []
            self.known: set[int] = set()

        def watch(self, tensor: Any, *, new: bool, counted: bool) -> None:
            storage = tensor.untyped_storage()
            if not storage.nbytes() or storage._cdata in self.known:
                return
            self.known.add(storage._cdata)
            if new:
                self.events.append(("alloc", storage.nbytes()))
            weakref.finalize(storage, self.end, storage._cdata, storage.nbytes(), counted)

        def watch_state(self, optimizer: Any) -> None:
            """What a step replaces ends in it."""
            for parameter in optimizer.state:
                for value in _state_of(optimizer, parameter).values():
                    self.watch(value, new=False, counted=True)

        def end(self, address: int, num_bytes: int, counted: bool) -> None:
            self.known.discard(address)
            if counted:
                self.events.append(("free", num_bytes))

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            # An argument never seen before is a number that torch wrapped on the host.
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor):
                    self.watch(leaf, new=False, counted=False)
            result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self.watch(leaf, new=True, counted=True)
            return result

    generator = torch.Generator().manual_seed(0)
    for _ in range(step):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        trace = StorageTrace()
        trace.watch_state(optimizer)
        with trace:
            optimizer.step()
        events = list(trace.events)
    return _in_order(events)


def _state_bytes(optimizer: Any, parameter: Any) -> dict[str, int]:
    """Bytes of the storages behind each state tensor of a parameter, by state name."""
    tensors = _state_of(optimizer, parameter)
    storages = {value.untyped_storage()._cdata for value in tensors.values() if value.numel()}
    assert len(storages) == sum(value.numel() > 0 for value in tensors.values()), "two states share a storage"
    return {name: value.untyped_storage().nbytes() for name, value in tensors.items()}


@pytest.fixture(scope="session")
def model_events() -> Callable[..., list[Event]]:
    """`(model, parameters, context)` to the allocations and frees that the model writes for a step."""
    return _model_events


@pytest.fixture(scope="session")
def real_events() -> Callable[..., list[Event]]:
    """`(optimizer, parameters, step=3)` to the allocations and frees of a steady step of a torch optimizer."""
    return _real_events


@pytest.fixture(scope="session")
def step_peak() -> Callable[..., int]:
    """`(model, parameters, context)` to the most bytes of temporaries alive at once in a step."""
    return _step_peak


@pytest.fixture(scope="session")
def state_bytes() -> Callable[..., dict[str, int]]:
    """`(optimizer, parameter)` to the bytes of its state tensors by name."""
    return _state_bytes
