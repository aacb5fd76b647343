"""Buffers of CUDA sorts and top-k selections, as torch 2.11's allocator recorded them on an H200."""

from __future__ import annotations

import pytest

from optplan.planner.optimizers.scratch import Scratch
from optplan.planner.optimizers.sorting import sort_workspace_bytes, write_sort_buffers, write_topk_buffers
from optplan.planner.tensors import Parameter
from optplan.planner.timeline import Allocation, TimelineBuilder

PARAMETER = Parameter("w", (1,), "mlp", "linear")


def _sizes(builder: TimelineBuilder) -> list[int]:
    return [event.bytes for event in builder.events if isinstance(event, Allocation)]


@pytest.mark.parametrize(
    ("slices", "numel", "expected"),
    [
        (1, 19_999, []),
        (1, 20_000, [2, 8, 8, 10_240, 1024, 80, 80, 1279, 1279]),
        (20, 29_056, [40, 160, 160, 296_960, 20_480, 2320, 2320, 1279, 1279]),
        (21, 9_999, []),
        (21, 10_000, [42, 168, 168, 107_520, 21_504, 840, 840, 1279, 1279]),
        (41, 8_000, [82, 328, 328, 167_936, 41_984, 1312, 1312, 1279, 1279]),
        (81, 5_000, [162, 648, 648, 207_360, 82_944, 1620, 1620, 1279, 1279]),
        (199, 5_000, [398, 1592, 1592, 407_552, 203_776, 3184, 3184, 1279, 1279]),
        (200, 3_000, [400, 1600, 1600, 307_200, 204_800, 2400, 2400, 1279, 1279]),
        (800, 800, [1600, 6400, 6400, 409_600, 819_200, 3200, 3200, 1279, 1279]),
        (1_000, 20_864, [2000, 8000, 8000, 1_024_000, 1_024_000, 8000, 8000, 1279, 1279]),
        (4_001, 399, []),
        (4_001, 400, [8002, 32_008, 32_008, 2_048_512, 4_097_024, 16_004, 16_004, 1279, 1279]),
        (4_511, 29_056, [9022, 36_088, 36_088, 4_619_264, 4_619_264, 36_088, 36_088, 1279, 1279]),
        (15_000, 29_056, [30_000, 120_000, 120_000, 15_360_000, 15_360_000, 120_000, 120_000, 1279, 1279]),
    ],
)
def test_topk_of_bf16_rows(slices: int, numel: int, expected: list[int]) -> None:
    builder = TimelineBuilder("step")
    write_topk_buffers(Scratch(builder), PARAMETER, slices=slices, slice_numel=numel, element_bytes=2)
    assert _sizes(builder) == expected


@pytest.mark.parametrize(
    ("numel", "fp32", "bf16"),
    [
        (4_097, 59_391, 47_103),
        (5_000, 70_143, 56_063),
        (6_000, 82_943, 66_815),
        (8_000, 106_751, 86_783),
        (9_999, 131_071, 107_007),
        (12_000, 155_903, 127_743),
        (20_000, 252_927, 208_895),
        (50_000, 619_263, 514_047),
    ],
)
def test_sort_workspace(numel: int, fp32: int, bf16: int) -> None:
    assert [sort_workspace_bytes(numel, element_bytes=width) for width in (4, 2)] == [fp32, bf16]


def test_short_sorts_take_only_the_indices() -> None:
    builder = TimelineBuilder("step")
    write_sort_buffers(Scratch(builder), PARAMETER, numel=4096, element_bytes=4)
    assert _sizes(builder) == [32_768]
