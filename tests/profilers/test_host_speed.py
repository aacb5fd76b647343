"""The miniature step by which a host's launching is timed, on tensors of the CPU."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from optplan.profilers.live import host_speed
from optplan.profilers.live.host_speed import launching_seconds

NO_LAUNCH = ("view", "_unsafe_view", "unflatten", "transpose", "detach", "empty", "t")
"""Operations that only look at a tensor differently."""
GPU = SimpleNamespace(type="cuda")
CPU = torch.device("cpu")


class _Counting(TorchDispatchMode):
    """Counts the operations that are dispatched, backward's too."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[operation.__name__.partition(".")[0]] += 1
        return operation(*args, **(kwargs or {}))


class _Gpu:
    """Stands for the GPU: notes what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def synchronize(self, _: torch.device) -> None:
        self.asked.append("synchronize")

    def empty_cache(self) -> None:
        self.asked.append("empty_cache")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> _Gpu:
    """Whose tensors are the CPU's."""
    stand_in, original = _Gpu(), host_speed._step_seconds
    monkeypatch.setattr(torch.cuda, "synchronize", stand_in.synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", stand_in.empty_cache)
    monkeypatch.setattr(host_speed, "_step_seconds", lambda _: original(CPU))
    return stand_in


@pytest.fixture
def no_garbage_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_repetition_launches_as_many_operations_as_are_counted(gpu: _Gpu) -> None:
    model = torch.nn.Sequential(*(host_speed._Block() for _ in range(host_speed._NUM_BLOCKS)))
    hidden, gradient = host_speed._ones().requires_grad_(), host_speed._ones()
    for _ in range(2):
        with _Counting() as counting:
            host_speed._timed(model, hidden, gradient)
        launched = {name: count for name, count in counting.counts.items() if name not in NO_LAUNCH}
        # Of every block 7 + 14 products, 2 sums and 3 sums of gradients; nothing else, so no other kernel.
        assert launched == {"mul": 6 * 21, "add": 6 * 5}
        assert sum(launched.values()) == host_speed.NUM_LAUNCHES == 156
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_median_repetition_after_the_warm_up_counts(gpu: _Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every reading of the clock a repetition's begin or end: 5 of 9 s, then 1 s to 20 s.
    taken = [9.0] * 5 + [float(seconds) for seconds in range(1, 21)]
    readings = iter([reading for seconds in taken for reading in (0.0, seconds)])
    monkeypatch.setattr(host_speed.time, "perf_counter", lambda: next(readings))
    assert launching_seconds(GPU) == pytest.approx(10.5 / 156)  # type: ignore[arg-type]
    assert gpu.asked == ["synchronize"] * 25 + ["empty_cache"]


@pytest.mark.usefixtures("no_garbage_collector", "gpu")
def test_nothing_is_left_and_no_random_number_is_drawn() -> None:
    def num_tensors() -> int:
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    random, tensors = torch.get_rng_state(), num_tensors()
    seconds = launching_seconds(GPU)  # type: ignore[arg-type]
    assert seconds is not None and seconds > 0
    assert num_tensors() == tensors
    assert torch.equal(torch.get_rng_state(), random)


def test_without_a_gpu_or_room_on_it_there_is_no_figure(gpu: _Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launching_seconds(CPU) is None
    assert gpu.asked == []

    def fail(*_: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(host_speed, "_timed", fail)
    assert launching_seconds(GPU) is None  # type: ignore[arg-type]
    assert gpu.asked == ["empty_cache"]
