"""The search for programs of one launch that disturb each other, on kernels that do and kernels that do not."""

# ruff: noqa: N803

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

_races = runpy.run_path(str(Path(__file__).with_name("program_races.py")))
watched, RaceError = _races["watched"], _races["RaceError"]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="memory is watched in Triton's interpreter")


@triton.jit
def tiles_kernel(x, num_rows, NUMEL: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, END: tl.constexpr):
    """Doubles rows: chunks of CHUNK rows in tiles of TILE; a tile ends with its chunk only if END."""
    tiles: tl.constexpr = (CHUNK + TILE - 1) // TILE
    chunk, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    rows = chunk * CHUNK + tile * TILE + tl.arange(0, TILE)
    end = num_rows
    if END:
        end = tl.minimum(num_rows, chunk * CHUNK + CHUNK)
    columns = tl.arange(0, 64)
    at = x + rows[:, None] * NUMEL + columns[None, :]
    mask = (rows < end)[:, None] & (columns < NUMEL)[None, :]
    tl.store(at, 2 * tl.load(at, mask=mask), mask=mask)


def _tiles(*, chunk: int, tile: int, end: bool) -> Callable[[], None]:
    x = torch.ones(50, 37)
    return lambda: tiles_kernel[(-(-50 // chunk) * -(-chunk // tile),)](x, 50, 37, chunk, tile, end)


@triton.jit
def shift_kernel(x, y, numel, BY: tl.constexpr, MEET: tl.constexpr, BLOCK: tl.constexpr):
    """To y what stands BY further on in x."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at + BY < numel
    value = tl.load(x + at + BY, mask=mask)
    if MEET:
        tl.debug_barrier()
    tl.store(y + at, value, mask=mask)


def _shift(*, by: int, in_place: bool, num_programs: int = 4, meet: bool = True) -> Callable[[], None]:
    x = torch.arange(64, dtype=torch.bfloat16)
    y = x if in_place else torch.zeros_like(x)
    return lambda: shift_kernel[(num_programs,)](x, y, 64, by, meet, 16)


@triton.jit
def sum_kernel(
    x, partials, total, count, READY: tl.constexpr, MEET: tl.constexpr, RESET: tl.constexpr, SEM: tl.constexpr,
    SCOPE: tl.constexpr,
):  # fmt: skip
    """The sum of all programs' parts by the one that is counted as the READY-th, or by all if that is 0."""
    pid, lane = tl.program_id(0), tl.arange(0, 8)
    tl.store(partials + pid, tl.sum(tl.load(x + pid * 8 + lane), axis=0))
    if MEET:
        tl.debug_barrier()
    done = tl.atomic_add(count, 1, sem=SEM, scope=SCOPE)
    if READY == 0 or done == READY - 1:
        tl.store(total + pid, tl.sum(tl.load(partials + lane), axis=0))
        if RESET:
            tl.store(count, 0)


def _sum(ready: int = 8, *, meet: bool = True, sem: str = "acq_rel", scope: str = "gpu") -> Callable[[], None]:
    x, partials, total = torch.arange(64.0), torch.zeros(8), torch.zeros(8)
    count = torch.zeros(1, dtype=torch.int32)
    return lambda: sum_kernel[(8,)](x, partials, total, count, ready, meet, ready == 8, sem, scope)


@triton.jit
def histogram_kernel(x, counts, SHOW: tl.constexpr):
    """Counts numbers by atomics; if SHOW, each program then looks."""
    lane = tl.arange(0, 8)
    tl.atomic_add(counts + tl.load(x + tl.program_id(0) * 8 + lane), 1)
    if SHOW:
        tl.load(counts)


def _histogram(*, show: bool) -> Callable[[], None]:
    x, counts = torch.arange(32, dtype=torch.int32) % 5, torch.zeros(5, dtype=torch.int32)
    return lambda: histogram_kernel[(4,)](x, counts, show)


CLEAN = {
    "tiles that divide a chunk": _tiles(chunk=16, tile=4, end=False),
    "tiles that end with their chunk": _tiles(chunk=18, tile=4, end=True),
    "copies": _shift(by=3, in_place=False, meet=False),
    "neighbouring halves of a word": _shift(by=0, in_place=True, meet=False),
    "a single program": _shift(by=1, in_place=True, num_programs=1),
    "the last sums": _sum(),
    "atomics": _histogram(show=False),
}
RACY = {
    "a tile that reaches into the next chunk": (
        _tiles(chunk=18, tile=4, end=False),
        "tiles_kernel: program 4 stores to bytes 2664 to 2960 of x, which program 5 stores to",
    ),
    "a load of what the next program stores": (
        _shift(by=1, in_place=True),
        "shift_kernel: program 1 stores to bytes 32 to 34 of x, which program 0 loads",
    ),
    "a load of what another thread stores": (
        _shift(by=1, in_place=True, num_programs=1, meet=False),
        "shift_kernel: program 0 stores to bytes 2 to 32 of x, which another of its threads loads "
        "with no barrier between",
    ),
    "a sum by all": (_sum(0), "sum_kernel: program 0 stores to bytes 0 to 4 of partials, which program 1 loads"),
    "a sum by the last but one": (
        _sum(7),
        "sum_kernel: program 0 stores to bytes 0 to 4 of partials, which program 6 loads",
    ),
    "a sum without a barrier": (
        _sum(meet=False),
        "sum_kernel: program 7 loads bytes 0 to 4 of partials, which program 0 stores to",
    ),
    "a counter that orders nothing": (
        _sum(sem="relaxed"),
        "sum_kernel: program 0 stores to bytes 0 to 4 of partials, which program 7 loads",
    ),
    "a counter of one block's threads": (
        _sum(scope="cta"),
        "sum_kernel: program 0 stores to bytes 0 to 4 of partials, which program 7 loads",
    ),
    "a look at atomics": (
        _histogram(show=True),
        "histogram_kernel: program 0 changes by atomics bytes 0 to 4 of counts, which program 1 loads",
    ),
}


@pytest.mark.parametrize("name", CLEAN)
def test_kernels_without_races_pass(name: str) -> None:
    with watched(dict) as launches:
        CLEAN[name]()
    assert len(launches) == 1


@pytest.mark.parametrize("name", RACY)
def test_races_are_found(name: str) -> None:
    launch, message = RACY[name]
    with watched(dict), pytest.raises(RaceError, match=f"^{re.escape(message)}$"):
        launch()


def test_memory_of_no_tensor_is_found() -> None:
    x = torch.arange(64, dtype=torch.float32)
    with watched(dict), pytest.raises(RaceError, match=r"^shift_kernel: program 3 loads bytes 0x\w+ to 0x\w+ outside"):
        shift_kernel[(4,)](x[:60], torch.zeros(64), 64, 0, False, 16)
    with watched():
        shift_kernel[(4,)](x[:60], torch.zeros(64), 64, 0, False, 16)


def test_launches_tell_who_stored_where() -> None:
    x, y = torch.arange(64, dtype=torch.float32), torch.zeros(64)
    with watched(lambda: {"first": y[:40], "last": y[40:], "read": x}) as launches:
        shift_kernel[(5,)](x, y, 64, 0, False, 16)
    assert [tuple(launch) for launch in launches] == [("shift_kernel", 5, {"first": 3, "last": 2, "read": 0})]


def test_nothing_is_watched_afterwards() -> None:
    _, (race, _) = next(iter(RACY.items()))
    with watched(), pytest.raises(RaceError):
        race()
    race()
