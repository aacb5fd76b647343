"""The buffers of CUDA reductions, as torch 2.11's allocator recorded them on an H200."""

from __future__ import annotations

import pytest

from optplan.planner.reductions import column_reduction_bytes, row_reduction_bytes, whole_reduction_bytes


@pytest.mark.parametrize(
    ("numel", "expected"),
    [
        (1, (0, 0)),
        (105, (0, 0)),
        (12282, (0, 0)),
        (513_513, (252, 4)),
        (1_048_576, (512, 4)),
        (2_359_296, (1152, 4)),
        (4_194_304, (2048, 4)),
        (16_777_216, (2112, 4)),
        (45_088_768, (2112, 4)),
    ],
)
def test_norm_of_a_whole_tensor(numel: int, expected: tuple[int, int]) -> None:
    assert whole_reduction_bytes(numel) == expected


@pytest.mark.parametrize(
    ("shape", "element_bytes", "expected"),
    [
        ((1, 768, 3072), 4, (0, 0)),
        ((1, 100, 37), 4, (0, 0)),
        ((1, 1001, 513), 4, (0, 0)),
        ((1, 2047, 6), 4, (0, 0)),
        ((1, 3072, 768), 4, (18_874_368, 24)),
        ((1, 3072, 768), 2, (9_437_184, 24)),
        ((1, 4096, 4096), 4, (134_217_728, 128)),
        ((1, 4096, 4096), 2, (67_108_864, 128)),
        ((1, 11008, 4096), 4, (138_412_032, 128)),
        ((1, 4096, 1024), 4, (33_554_432, 32)),
        ((1, 50257, 768), 4, (138_412_032, 24)),
        ((8, 512, 256), 4, (0, 0)),  # means of each matrix over its own rows
        ((1, 4096, 256), 4, (8_388_608, 8)),  # maxima over the rows of all eight
    ],
)
def test_mean_or_maximum_over_rows(shape: tuple[int, int, int], element_bytes: int, expected: tuple[int, int]) -> None:
    matrices, rows, columns = shape
    assert column_reduction_bytes(rows, columns, matrices=matrices, element_bytes=element_bytes) == expected


@pytest.mark.parametrize(
    ("shape", "element_bytes", "expected"),
    [
        ((16, 65_536), 4, (0, 0)),
        ((25, 102_400), 4, (0, 0)),
        ((600, 200_000), 4, (0, 0)),
        ((1, 200_000), 4, (100, 4)),
        ((2, 140_000), 4, (144, 8)),
        ((3, 140_001), 4, (216, 12)),
        ((4, 1_000_003), 4, (1968, 16)),
        ((8, 524_288), 4, (2048, 32)),
        ((32, 131_072), 4, (2048, 128)),
        ((32, 524_288), 4, (2176, 128)),  # the squared gradient of Llama-2-7B's query weight by heads
        ((71, 300_000), 4, (2272, 284)),
        ((100, 300_000), 4, (2400, 400)),
        ((1, 200_000), 2, (50, 4)),  # a maximum
        ((1, 16_777_216), 8, (4224, 4)),  # a count
        ((2, 140_000), 16, (576, 8)),  # a maximum with its index
        ((100, 300_000), 16, (9600, 400)),
    ],
)
def test_over_the_columns_of_long_rows(shape: tuple[int, int], element_bytes: int, expected: tuple[int, int]) -> None:
    assert row_reduction_bytes(*shape, element_bytes=element_bytes) == expected


def test_empty_matrices_need_no_buffers() -> None:
    for rows, columns in ((0, 10**6), (10**6, 0)):
        assert row_reduction_bytes(rows, columns) == (0, 0)
        assert column_reduction_bytes(rows, columns) == (0, 0)


@pytest.mark.parametrize(
    ("num_outputs", "num_inputs", "scratch"),
    [
        (64, 128, (0, 0)),
        (64, 346, (0, 0)),
        (96, 512, (0, 0)),
        (384, 519, (0, 0)),
        (1024, 1024, (8_388_608, 32)),
        (1600, 1402, (18_022_400, 52)),
        (768, 2048, (12_582_912, 24)),
        (2304, 2103, (38_928_384, 72)),
        (4096, 2048, (67_108_864, 128)),
        (384, 3505, (10_813_440, 12)),
        (768, 8192, (50_331_648, 24)),
        (2048, 16_384, (138_412_032, 64)),
        (64, 16_384, (2_097_152, 4)),
        (256, 32_768, (67_108_864, 8)),
        (128, 262_144, (138_412_032, 4)),
    ],
)
def test_column_sums_of_a_training_step(num_outputs: int, num_inputs: int, scratch: tuple[int, int]) -> None:
    assert column_reduction_bytes(num_inputs, num_outputs) == scratch
