"""The copy that a GPU's bandwidth is read from, on an allocator that has less than the driver says."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from optplan.profilers.live import bandwidth
from optplan.profilers.live.bandwidth import copy_bandwidth

MIB = 2**20


class _Memory:
    """Stands for an allocator with a limit: tensors are one element each, their bytes are counted while they live."""

    def __init__(self, limit: int, free: int) -> None:
        self.limit, self.free, self.held, self.cached, self.asked = limit, free, 0, 512 * MIB, list[int]()

    def empty(self, size: int, **_: Any) -> torch.Tensor:
        self.asked.append(size // MIB)
        if self.held + size > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.held += size
        tensor = torch.zeros(1)
        weakref.finalize(tensor, self._release, size)
        return tensor

    def _release(self, size: int) -> None:
        self.held -= size
        self.cached += size

    def empty_cache(self) -> None:
        self.cached = 0


@pytest.fixture
def no_garbage_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_garbage_collector")
@pytest.mark.parametrize(
    ("limit", "free", "asked", "size"),
    [
        (140_000, 140_000, [1024, 1024], 1024),
        # The driver knows of no limit: the first, then the second of a pair cannot be had.
        (900, 140_000, [1024, 512, 512, 256, 256], 256),
        (1100, 140_000, [1024, 1024, 512, 512], 512),
        (100, 140_000, [1024, 512, 256], None),
        # A GPU that others fill is not filled further.
        (140_000, 4100, [512, 512], 512),
        (140_000, 2000, [], None),
    ],
)
def test_a_copy_takes_what_can_be_had_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, limit: int, free: int, asked: list[int], size: int | None
) -> None:
    memory = _Memory(limit * MIB, free * MIB)
    monkeypatch.setattr(torch, "empty", memory.empty)
    monkeypatch.setattr(torch.cuda, "empty_cache", memory.empty_cache)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (memory.free, 140_000 * MIB))
    monkeypatch.setattr(bandwidth, "_timed_copy", lambda source, target: 0.001)
    found = copy_bandwidth(torch.device("cuda", 0))
    assert found == (None if size is None else 2 * size * MIB / 0.001)
    assert memory.asked == asked
    assert (memory.held, memory.cached) == (0, 0)
