from __future__ import annotations

import torch

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
