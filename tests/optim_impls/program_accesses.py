"""Takes down every access to memory of the programs of a launch in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

LOAD, STORE, ATOMIC = range(3)


class Access(NamedTuple):
    """One memory operation: addresses as ranges of bytes, who did it and when."""

    starts: np.ndarray
    ends: np.ndarray
    program: int
    kind: int
    moment: int
    barriers: int


class Arrival(NamedTuple):
    """A program's atomic at a counter: when, and after how many barriers."""

    counter: int
    program: int
    moment: int
    barriers: int


class Haste(NamedTuple):
    """Two threads of a program at one address with no barrier between, of which one stores: what first, what then."""

    program: int
    first: int
    then: int
    address: int


class _Operation(NamedTuple):
    """An operation since the last barrier; addresses of lanes that take no part are negative."""

    kind: int
    lanes: np.ndarray
    addresses: np.ndarray


class Log:
    """The memory operations of one launch.

    Attributes:
        accesses: In order.
        arrivals: Atomics that order programs.
        haste: The first threads that did not wait for each other, if any.
    """

    def __init__(self, builder: Any) -> None:
        self._builder = builder
        self.clear()

    def clear(self) -> None:
        """Begin with another launch."""
        self._program = -1
        self._barriers = 0
        self._since_barrier: list[_Operation] = []
        self.accesses: list[Access] = []
        self.arrivals: list[Arrival] = []
        self.haste: Haste | None = None

    def touch(self, kind: int, pointers: Any, mask: Any, *, orders: bool = False) -> None:
        """Take down an operation of the program that runs now."""
        program = self._current()
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        lanes = pointers.data.astype(np.int64)
        if mask is not None:
            lanes = np.where(mask.data, lanes, -1)
        addresses = lanes[lanes >= 0]
        if not addresses.size:
            return
        moment = len(self.accesses)
        if orders:
            # Atomics at one counter are ordered among themselves, whatever the barriers.
            self.arrivals.append(Arrival(int(addresses[0]), program, moment, self._barriers))
        if self.haste is None:
            self._compare(_Operation(kind, lanes, addresses))
        starts, ends = _ranges(addresses, size)
        self.accesses.append(Access(starts, ends, program, kind, moment, self._barriers - orders))

    def meet(self) -> None:
        """A barrier among the threads of the program that runs now."""
        self._current()
        self._barriers += 1
        self._since_barrier = []

    def _compare(self, then: _Operation) -> None:
        """Look for what another lane did at one of the addresses since the last barrier; then one of the two stores."""
        low, high = then.addresses.min(), then.addresses.max()
        for first in self._since_barrier:
            unlike = first.kind != then.kind or first.kind == STORE
            if unlike and first.addresses.min() <= high and first.addresses.max() >= low:
                shared = np.intersect1d(first.addresses, then.addresses)
                if first.lanes.shape == then.lanes.shape:
                    shared = np.setdiff1d(shared, then.lanes[first.lanes == then.lanes])
                if shared.size:
                    self.haste = Haste(self._program, first.kind, then.kind, int(shared[0]))
        self._since_barrier.append(then)

    def _current(self) -> int:
        (x, y, z), (_, ny, nz) = self._builder.grid_idx, self._builder.grid_dim
        program = (x * ny + y) * nz + z
        if program != self._program:
            self._program, self._barriers, self._since_barrier = program, 0, []
        return int(program)


def _ranges(addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """First bytes, and those behind the last, of the ranges that elements of `size` bytes make up."""
    gaps = np.diff(addresses)
    if (gaps < 0).any():
        addresses = np.sort(addresses)
        gaps = np.diff(addresses)
    cuts = np.flatnonzero(gaps > size)
    last = np.append(cuts, len(addresses) - 1)
    return addresses[np.append(0, cuts + 1)], addresses[last] + size


def watching(builder: Any, log: Log) -> dict[str, Callable[..., Any]]:
    """The interpreter's memory operations and barriers, taken down in the log."""
    load, store, barrier = builder.create_masked_load, builder.create_masked_store, builder.create_barrier
    swap, change = builder.create_atomic_cas, builder.create_atomic_rmw

    def masked_load(pointers: Any, mask: Any, *more: Any, **named: Any) -> Any:
        log.touch(LOAD, pointers, mask)
        return load(pointers, mask, *more, **named)

    def masked_store(pointers: Any, value: Any, mask: Any, *more: Any, **named: Any) -> Any:
        log.touch(STORE, pointers, mask)
        return store(pointers, value, mask, *more, **named)

    def atomic_cas(pointer: Any, compared: Any, value: Any, sem: Any, scope: Any) -> Any:
        log.touch(ATOMIC, pointer, None)
        return swap(pointer, compared, value, sem, scope)

    def atomic_rmw(operation: Any, pointer: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
        single = pointer.data.size == 1
        log.touch(ATOMIC, pointer, mask, orders=single and _orders(sem, scope))
        return change(operation, pointer, value, mask, sem, scope)

    def meet() -> Any:
        log.meet()
        return barrier()

    return {
        "create_masked_load": masked_load,
        "create_masked_store": masked_store,
        "create_atomic_cas": atomic_cas,
        "create_atomic_rmw": atomic_rmw,
        "create_barrier": meet,
    }


def _orders(sem: Any, scope: Any) -> bool:
    """Whether an atomic orders what different programs do before and after it."""
    from triton._C.libtriton import ir

    wide = (ir.MEM_SYNC_SCOPE.GPU, ir.MEM_SYNC_SCOPE.SYSTEM)
    return bool(sem == ir.MEM_SEMANTIC.ACQUIRE_RELEASE and scope in wide)
