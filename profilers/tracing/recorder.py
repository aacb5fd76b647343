"""What a run without contents allocates: births and deaths of storages, in the order in which they happen.

Source: torch keeps the Python object of a storage alive exactly as long as the storage, so that a weak reference to it
ends when the last tensor, saved variable or gradient that uses the memory is gone.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch

from optplan.planner.timeline import Allocation, Category, Free, Phase, Timeline


class Entry:
    """One allocation; its category and name may be found out after it is made."""

    __slots__ = ("category", "itemsize", "name", "num_bytes", "phase", "stream")

    def __init__(
        self, num_bytes: int, category: Category, name: str, phase: Phase, itemsize: int, stream: int = 0
    ) -> None:
        self.num_bytes = num_bytes
        self.category = category
        self.name = name
        self.phase = phase
        self.itemsize = itemsize
        self.stream = stream


class _Watch(weakref.ref[torch.UntypedStorage]):
    """A weak reference that knows the storage's address."""

    __slots__ = ("address",)
    address: int


class Recorder:
    """Collects allocations and frees; ids count from 1.

    Attributes:
        events: Ids in the order in which memory is allocated, negative where it ends.
        marks: Length of `events` at each name set by `mark`.
        phase: Phase of what happens now.
        stream: Stream on which memory is allocated now, 0 for the one that computes.
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.events: list[int] = []
        self.phases: list[Phase] = []
        self.phase: Phase = "load"
        self.stream = 0
        self._ids: dict[int, int] = {}
        self._watches: dict[int, _Watch] = {}

    def alloc(self, num_bytes: int, category: Category, name: str, *, itemsize: int = 1) -> int:
        """Record an allocation; its id."""
        self.entries.append(Entry(num_bytes, category, name, self.phase, itemsize, self.stream))
        id_ = len(self.entries)
        self.events.append(id_)
        self.phases.append(self.phase)
        return id_

    def free(self, id_: int) -> None:
        """Record the end of an allocation."""
        self.events.append(-id_)
        self.phases.append(self.phase)

    def scratch(self, sizes: Iterable[int], name: str) -> None:
        """Record what a kernel allocates while it runs, let go in reverse order."""
        ids = [self.alloc(num_bytes, "workspace", name) for num_bytes in sizes if num_bytes]
        for id_ in reversed(ids):
            self.free(id_)

    def track(self, tensor: torch.Tensor, category: Category, name: str) -> None:
        """Record the tensor's memory unless it is known; only memory of the simulated device counts."""
        if tensor.device.type != "meta":
            return
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._ids:
            return
        num_bytes = storage.nbytes()
        self._ids[address] = self.alloc(num_bytes, category, name, itemsize=tensor.itemsize) if num_bytes else 0
        self._watch(storage, address)

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's memory needs no record: it has one, or is not on the simulated device."""
        return tensor.device.type != "meta" or tensor.untyped_storage()._cdata in self._ids

    def ignore(self, tensor: torch.Tensor) -> None:
        """Treat memory as if it were elsewhere."""
        storage = tensor.untyped_storage()
        self._ids[storage._cdata] = 0
        self._watch(storage, storage._cdata)

    def resize(self, storage: torch.UntypedStorage, category: Category, name: str, *, itemsize: int = 1) -> None:
        """Record that a storage of the simulated device has been given as many bytes as it has now."""
        address = storage._cdata
        if address not in self._ids:
            self._watch(storage, address)
        elif self._ids[address]:
            self.free(self._ids[address])
        num_bytes = storage.nbytes()
        self._ids[address] = self.alloc(num_bytes, category, name, itemsize=itemsize) if num_bytes else 0

    def inherit(self, old: torch.Tensor, new: torch.Tensor) -> bool:
        """Let `new` take over the memory of `old`, which ends without a trace; False if `new` is known already."""
        before, after = old.untyped_storage(), new.untyped_storage()
        id_ = self._ids.get(before._cdata)
        if not id_ or after._cdata in self._ids:
            return False
        self._ids[before._cdata] = 0
        self._ids[after._cdata] = id_
        self._watch(after, after._cdata)
        return True

    def id_of(self, tensor: torch.Tensor) -> int:
        """Id of the tensor's memory, 0 if it has none here."""
        return self._ids.get(tensor.untyped_storage()._cdata, 0)

    def label(self, tensor: torch.Tensor, category: Category, name: str) -> None:
        """Say, when it is known, whose memory this is."""
        id_ = self.id_of(tensor)
        if id_:
            entry = self.entries[id_ - 1]
            entry.category, entry.name, entry.itemsize = category, name, tensor.itemsize

    def _watch(self, storage: torch.UntypedStorage, address: int) -> None:
        watch = _Watch(storage, self._ended)
        watch.address = address
        self._watches[address] = watch

    def _ended(self, watch: Any) -> None:
        address = watch.address
        if self._watches.get(address) is not watch:
            return
        del self._watches[address]
        id_ = self._ids.pop(address)
        if id_:
            self.free(id_)

    def stop(self) -> None:
        """Record nothing that ends from now on."""
        self._watches.clear()
        self._ids.clear()

    def timeline(self, start: int = 0, end: int | None = None) -> Timeline:
        """The events from index `start` to `end`."""
        return [
            _allocation(id_, self.entries[id_ - 1]) if id_ > 0 else Free(-id_, phase)
            for id_, phase in zip(self.events[start:end], self.phases[start:end], strict=True)
        ]


def _allocation(id_: int, entry: Entry) -> Allocation:
    return Allocation(id_, entry.num_bytes, entry.category, entry.name, entry.phase, entry.itemsize, entry.stream)
