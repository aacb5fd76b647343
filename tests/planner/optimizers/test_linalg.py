"""Workspaces of decompositions, as cuSOLVER (CUDA 13) and torch 2.11's allocator gave them on an H200."""

from __future__ import annotations

import pytest

from optplan.planner.optimizers.linalg import qr_workspace_bytes, svd_workspace_bytes


@pytest.mark.parametrize(
    ("rows", "columns", "measured"),
    [
        (64, 64, 53_632),
        (100, 37, 3_146_112),
        (37, 100, 3_160_960),
        (512, 512, 2_238_592),
        (768, 3072, 26_221_568),
        (3072, 768, 16_784_384),
        (1000, 1536, 20_180_224),
        (2048, 2560, 65_815_552),
        (2560, 2048, 50_934_016),
        (4096, 1024, 27_534_336),
        (1024, 4096, 44_311_552),
        (4096, 4096, 135_549_440),
        (11008, 4096, 267_420_672),
        (4096, 11008, 447_775_744),
        (8192, 64, 10_896_896),
        (28672, 8192, 1_254_425_600),
    ],
)
def test_svd_workspace_is_within_300_bytes(rows: int, columns: int, measured: int) -> None:
    assert abs(svd_workspace_bytes(rows, columns) - measured) <= 300


@pytest.mark.parametrize(
    ("size", "measured"),
    [
        (512, (4_194_432, 852_992)),
        (768, (5_243_008, 1_246_208)),
        (1000, (6_193_280, 1_602_560)),
        (1024, (6_291_584, 1_639_424)),
        (3072, (14_680_192, 4_785_152)),
        (4096, (18_874_496, 6_358_016)),
    ],
)
def test_qr_workspaces(size: int, measured: tuple[int, int]) -> None:
    assert qr_workspace_bytes(size) == measured


@pytest.mark.parametrize(("size", "measured"), [(37, (3_145_856, 137_600)), (100, (3_145_856, 186_624))])
def test_qr_workspaces_of_small_matrices_are_close(size: int, measured: tuple[int, int]) -> None:
    factorize, multiply = qr_workspace_bytes(size)
    assert factorize == measured[0]
    assert abs(multiply - measured[1]) <= 34_000
