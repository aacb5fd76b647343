"""Launch tables on the host, and kernels that are launched past Triton's dispatch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optplan.optim_impls import launch
from optplan.optim_impls.launch import TableImage, is_aligned
from optplan.planner.optimizers.launch import CHUNK_NUMEL, launch_table_bytes
from optplan.planner.tensors import Parameter

NUMELS = (3, CHUNK_NUMEL, CHUNK_NUMEL + 1, 2 * CHUNK_NUMEL, 1)


def test_rows_and_chunks() -> None:
    rows = [[torch.empty(numel), torch.empty(numel)] for numel in NUMELS]
    table = TableImage(rows, [4, 9, 2, 7, 5]).upload()
    assert table.rows.tolist() == [
        [p.data_ptr(), g.data_ptr(), numel, ordinal]
        for (p, g), numel, ordinal in zip(rows, NUMELS, (4, 9, 2, 7, 5), strict=True)
    ]
    assert table.chunk_row.tolist() == [0, 1, 2, 2, 3, 3, 4]
    assert table.chunk_offset.tolist() == [0, 0, 0, 65536, 0, 65536, 0]
    assert table.num_chunks == 7


def test_bytes_are_what_the_planner_says() -> None:
    rows = [[torch.empty(numel)] * 5 for numel in NUMELS]
    described = [Parameter("p", (numel,), "other", "linear") for numel in NUMELS]
    table = TableImage(rows, [0] * 5).upload()
    # Five tensors with five pointers, elements and ordinal, and seven chunks of an offset and a row.
    assert table.buffer.nbytes == 5 * 7 * 8 + 7 * 12 == launch_table_bytes(described, num_lists=5)


def test_alignment() -> None:
    base = torch.empty(64)
    assert is_aligned(base, base[4:])
    assert not is_aligned(base, base[1:])


class Kernel:
    """Stands for a kernel of Triton's: notes how it is called, itself and once it is compiled."""

    arg_names = ("x", "y", "SIZE", "FLAG")

    def __init__(self) -> None:
        self.dispatched: list[Any] = []
        self.launched: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        def dispatch(*arguments: Any, **options: Any) -> Any:
            self.dispatched.append((grid, arguments, options))
            return self

        return dispatch if not self.dispatched or not launch.TAKES_CONSTANTS else lambda *a: self.launched.append(a)


def test_a_kernel_is_dispatched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "TAKES_CONSTANTS", True)
    kernel = Kernel()
    run = launch.BoundKernel(kernel, 7, FLAG=True, num_warps=2, SIZE=64)
    for number in (1, 2, 3):
        run("x", number)
    assert kernel.dispatched == [((7, 1, 1), ("x", 1), {"FLAG": True, "num_warps": 2, "SIZE": 64})]
    # The constants follow in the kernel's order; options of the compiler are none of them.
    assert kernel.launched == [("x", 2, 64, True), ("x", 3, 64, True)]


def test_older_tritons_dispatch_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "TAKES_CONSTANTS", False)
    kernel = Kernel()
    run = launch.BoundKernel(kernel, 7, SIZE=64)
    for number in (1, 2):
        run("x", number)
    assert [arguments for _, arguments, _ in kernel.dispatched] == [("x", 1), ("x", 2)]
    assert kernel.launched == []
