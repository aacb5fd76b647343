"""Finds programs of one launch that touch the same memory, by watching every access in Triton's interpreter.

A GPU runs the programs of a launch in any order and at once. So no two may store to the same byte, and none may load
what another stores, unless one waits for the other. The interpreter runs them one after the other, which hides such
faults; here the bytes that each program touches are compared instead.

One way of waiting is understood: programs store, meet at a barrier of their own and count themselves with an atomic
that acquires and releases, once each; what the last of them then does comes after what the others did before their
barriers. It is the last that was counted who may do so, as in another run that is another program.

The threads of a program are watched too: between two barriers none may store to what another loads or stores to. Which
thread does what only the compiler knows; the same place in operands of one shape is taken to be the same thread's.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

_record = runpy.run_path(str(Path(__file__).with_name("program_accesses.py")))
LOAD, STORE, ATOMIC = (_record[name] for name in ("LOAD", "STORE", "ATOMIC"))
_VERBS = ("loads", "stores to", "changes by atomics")
_NOBODY = -1


class RaceError(AssertionError):
    """Programs of one launch disturb each other, or one of them leaves its tensors."""


class Launch(NamedTuple):
    """One launch in which nothing was found.

    Attributes:
        kernel: Name.
        num_programs: Programs of the grid.
        writers: How many programs stored to each tensor that has a name.
    """

    kernel: str
    num_programs: int
    writers: Mapping[str, int]


class _Extent(NamedTuple):
    """Where a tensor lies, in bytes."""

    name: str
    start: int
    end: int


class _Cover(NamedTuple):
    """What some accesses touch: for each stretch between two bounds how many programs do, and the sum of their numbers.

    Two covers of one program each and equal sums are of the same program.
    """

    programs: np.ndarray
    total: np.ndarray

    def meets(self, other: _Cover) -> np.ndarray:
        """Where a program of this one and another program of the other are."""
        same = (self.programs == 1) & (other.programs == 1) & (self.total == other.total)
        meeting: np.ndarray = (self.programs > 0) & (other.programs > 0) & ~same
        return meeting


class _Accesses:
    """All accesses of a launch, range by range.

    Attributes:
        bounds: Bytes where a range or a tensor begins or ends; starts and ends are given as places in it.
        program: Of each range.
        kind: Of each range.
        barriers: How many the program had met.
        late: The counter at which the program was the last and had been; -1 if there is none.
        counters: For each counter the arrivals, by program and in order.
    """

    def __init__(self, log: Any, extents: list[_Extent]) -> None:
        accesses = log.accesses
        self.counters = _counters(log.arrivals)
        starts, ends = (np.concatenate(parts) for parts in zip(*(access[:2] for access in accesses), strict=True))
        known = np.array([bound for extent in extents for bound in extent[1:]], dtype=np.int64)
        self.bounds = np.unique(np.concatenate([starts, ends, known]))
        self.start, self.end = (np.searchsorted(self.bounds, of) for of in (starts, ends))
        columns = np.array([(a.program, a.kind, a.barriers) for a in accesses], dtype=np.int64)
        columns = np.column_stack([columns, _late(accesses, self.counters)])
        repeats = [len(access.starts) for access in accesses]
        self.program, self.kind, self.barriers, self.late = np.repeat(columns, repeats, axis=0).T

    def cover(self, chosen: np.ndarray) -> _Cover:
        """What the chosen ranges touch, each program counted once."""
        size = len(self.bounds)
        program, start, end = _merged(self.program[chosen], self.start[chosen], self.end[chosen], size)
        sums = []
        for weights in (np.ones(len(program)), program.astype(np.float64)):
            begun, ended = (np.bincount(of, weights, minlength=size) for of in (start, end))
            sums.append(np.cumsum(begun - ended)[:-1])
        return _Cover(*sums)


def _merged(program: np.ndarray, start: np.ndarray, end: np.ndarray, size: int) -> tuple[np.ndarray, ...]:
    """The unions of each program's ranges: programs, starts and ends."""
    order = np.lexsort((start, program))
    program, start, end = program[order], start[order], end[order]
    reach = np.maximum.accumulate(program * size + end)
    first = np.append(True, (program * size + start)[1:] > reach[:-1])[: len(program)]
    last = np.append(first[1:], True)[: len(program)]
    return program[first], start[first], (reach - program * size)[last]


def _counters(arrivals: list[Any]) -> list[dict[int, Any]]:
    """The arrivals at each counter with which several programs count themselves, once each."""
    by_counter: dict[int, list[Any]] = {}
    for arrival in arrivals:
        by_counter.setdefault(arrival.counter, []).append(arrival)
    found = [({arrival.program: arrival for arrival in of}, len(of)) for of in by_counter.values()]
    return [arrived for arrived, number in found if len(arrived) == number > 1]


def _late(accesses: list[Any], counters: list[dict[int, Any]]) -> np.ndarray:
    """For each access the counter at which its program was the last and had been; of several the last such."""
    arrivals = [list(arrived.values())[-1] for arrived in counters]
    late = np.full(len(accesses), _NOBODY)
    programs, moments = np.array([a.program for a in accesses]), np.arange(len(accesses))
    for place in sorted(range(len(arrivals)), key=lambda place: arrivals[place].moment):
        late[(programs == arrivals[place].program) & (moments > arrivals[place].moment)] = place
    return late


class _Check:
    """Compares the programs of one launch.

    Raises:
        RaceError: Two of them are in each other's way, or one is outside the tensors.
    """

    def __init__(self, kernel: str, log: Any, extents: list[_Extent], *, bounded: bool) -> None:
        self._kernel, self._extents = kernel, extents
        self._all = _Accesses(log, extents)
        if bounded:
            self._stay_inside()
        late = self._all.late != _NOBODY
        for chosen in (~late, late):
            self._keep_apart(chosen, chosen)
        for place, arrived in enumerate(self._all.counters):
            self._keep_apart(self._all.late == place, ~late & ~self._came_before(arrived))
        if log.haste is not None:
            self._refuse_haste(log.haste)

    def _came_before(self, arrived: Mapping[int, Any]) -> np.ndarray:
        """Accesses that the last program at a counter has waited for: before a barrier before the others' arrival."""
        barriers = np.full(int(self._all.program.max()) + 1, _NOBODY)
        for arrival in arrived.values():
            barriers[arrival.program] = arrival.barriers
        before: np.ndarray = self._all.barriers < barriers[self._all.program]
        return before

    def _keep_apart(self, some: np.ndarray, others: np.ndarray) -> None:
        """No two programs store to a byte, and none loads what another stores or changes by atomics."""
        for kinds in ((STORE, STORE), (STORE, LOAD), (STORE, ATOMIC), (ATOMIC, LOAD)):
            for kind, other in {kinds, kinds[::-1]} if some is not others else {kinds}:
                one, two = some & (self._all.kind == kind), others & (self._all.kind == other)
                if one.any() and two.any():
                    self._refuse(self._all.cover(one).meets(self._all.cover(two)), one, two)

    def _refuse(self, wrong: np.ndarray, one: np.ndarray, two: np.ndarray) -> None:
        if not wrong.any():
            return
        found, number = self._all, int(np.argmax(wrong))
        there = (found.start <= number) & (found.end > number)
        pairs = [(a, b) for a in np.flatnonzero(there & one) for b in np.flatnonzero(there & two)]
        a, b = next((a, b) for a, b in pairs if found.program[a] != found.program[b])
        raise RaceError(
            f"{self._kernel}: program {found.program[a]} {_VERBS[found.kind[a]]} {self._where(number)}, "
            f"which program {found.program[b]} {_VERBS[found.kind[b]]}"
        )

    def _refuse_haste(self, haste: Any) -> None:
        where = self._where(int(np.searchsorted(self._all.bounds, haste.address, "right")) - 1)
        raise RaceError(
            f"{self._kernel}: program {haste.program} {_VERBS[haste.then]} {where}, which another of its threads "
            f"{_VERBS[haste.first]} with no barrier between"
        )

    def _stay_inside(self) -> None:
        """No program touches what belongs to no tensor."""
        found, size = self._all, len(self._all.bounds)
        starts, ends = (np.searchsorted(found.bounds, [e[place] for e in self._extents]) for place in (1, 2))
        counts = [np.bincount(of, minlength=size) for of in (starts, ends, found.start, found.end)]
        inside, touched = np.cumsum(counts[0] - counts[1]), np.cumsum(counts[2] - counts[3])
        wrong = (inside <= 0) & (touched > 0)
        if wrong.any():
            number = int(np.argmax(wrong))
            at = int(np.argmax((found.start <= number) & (found.end > number)))
            raise RaceError(
                f"{self._kernel}: program {found.program[at]} {_VERBS[found.kind[at]]} {self._where(number)}"
            )

    def _where(self, number: int) -> str:
        """A stretch in words."""
        start, end = (int(bound) for bound in self._all.bounds[number : number + 2])
        holders = [extent for extent in self._extents if extent.start <= start < extent.end]
        if not holders:
            before = [extent for extent in self._extents if extent.end <= start]
            nearest = max(before, key=lambda extent: extent.end, default=None)
            behind = f", {start - nearest.end} bytes behind {nearest.name}" if nearest else ""
            return f"bytes {start:#x} to {end:#x} outside all tensors{behind}"
        holder = min(holders, key=lambda extent: extent.end - extent.start)
        return f"bytes {start - holder.start} to {end - holder.start} of {holder.name}"

    def writers(self, names: Mapping[str, Any]) -> dict[str, int]:
        """How many programs store to each of the tensors."""
        found, stores = self._all, self._all.kind == STORE
        numbers = {}
        for extent in self._extents:
            if extent.name in names:
                first, last = np.searchsorted(found.bounds, extent[1:])
                inside = stores & (found.start < last) & (found.end > first)
                numbers[extent.name] = len(np.unique(found.program[inside]))
        return numbers


def _extents(tensors: Mapping[str, Any]) -> list[_Extent]:
    """Where the tensors lie; what is none, or empty, is left out."""
    found = []
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            found.append(_Extent(name, start, start + (last + 1) * tensor.element_size()))
    return found


@contextmanager
def watched(tensors: Callable[[], Mapping[str, torch.Tensor]] | None = None) -> Iterator[list[Launch]]:
    """Within it, every launch of a kernel is checked as soon as it is over; those without faults are listed.

    Args:
        tensors: Names all tensors that kernels may touch besides their arguments, asked for at every launch. If given,
            a kernel may not touch any other memory.

    Raises:
        RaceError: Programs of one launch disturb each other, or leave the tensors.
    """
    from triton.runtime import interpreter

    builder, launches = interpreter.interpreter_builder, []
    log = _record["Log"](builder)
    plain = interpreter.GridExecutor.__call__

    def launch(self: Any, *arguments: Any, **more: Any) -> None:
        log.clear()
        plain(self, *arguments, **more)
        if log.accesses:
            named = dict(tensors()) if tensors is not None else {}
            extents = _extents(dict(zip(self.arg_names, arguments, strict=False)) | more) + _extents(named)
            check = _Check(self.fn.__name__, log, extents, bounded=tensors is not None)
            x, y, z = builder.grid_dim
            launches.append(Launch(self.fn.__name__, x * y * z, check.writers(named)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launch)
        for name, function in _record["watching"](builder, log).items():
            patch.setattr(builder, name, function)
        yield launches
