"""Peaks of real steps on an H200: requested bytes of the temporaries, as torch 2.11's allocator recorded them.

The step is one that renews projectors or bases where the optimizer has any. Packages: bitsandbytes 0.50.2, torchao
0.18.0, galore-torch 1.0, apollo-torch 1.0.3, came-pytorch 0.1.3, pytorch_optimizer 4.1.0, flashoptim 0.1.4.
"""

from __future__ import annotations

from typing import Any

import pytest

from optplan.planner.optimizers.base import OptimizerContext
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.tensors import Parameter

FP32, BF16 = "float32", "bfloat16"
AO, PORT = {"implementation": "torchao"}, {"implementation": "pytorch_optimizer"}

# Tensors of 32000 rows are embeddings, which are not projected.
SMALL = [(768, 3072), (3072, 768), (1000,), (4096,), (100, 37)]
MIXED = [(4096, 4096), (11008, 4096), (4096, 1024), (50257, 768), (1001, 513), (2047, 6), (8, 512, 256), (3, 5, 7), ()]
LOW_RANK = [(32000, 512), (4096, 4096), (11008, 4096), (4096, 1024), (1000,), (512, 4096)]
MATRICES = [(768, 3072), (3072, 768), (100, 37)]
SVD = [(32000, 512), (1024, 2048), (2048, 1024), (1024, 256), (100, 37), (1000,)]
BASES = [(1024, 4096), (500, 300), (12000, 64), (512,)]
BLOCKS = [(1024, 768), (4096,), (4095,), (100, 37)]
LARGE = [(4096, 4096), (32000, 4096), (4096,)]

PEAKS = [
    ("adamw-8bit", {}, FP32, SMALL, 0),
    ("adamw-8bit", {}, BF16, SMALL, 0),
    ("adamw-8bit", AO, FP32, BLOCKS, 6_316_032),
    ("adamw-8bit", AO, BF16, BLOCKS, 6_316_032),
    ("adamw-8bit", AO, BF16, LARGE, 1_052_672_000),
    ("adamw-8bit", AO | {"block_size": "128"}, BF16, [(512, 384)], 1_585_152),
    ("adamw-8bit", AO | {"block_size": "2048"}, BF16, [(512, 384)], 1_573_632),
    ("adamw-8bit", AO, FP32, [(8, 512, 384), (64, 64)], 12_632_064),
    ("adamw-4bit", {}, FP32, BLOCKS, 18_923_520),
    ("adamw-4bit", {}, BF16, LARGE, 3_153_920_000),
    ("adamw-fp8", {}, FP32, BLOCKS, 1_597_440),
    ("adamw-fp8", {}, BF16, LARGE, 266_240_000),
    # Rows that blocks of 256 do not fit need no buffer of codes.
    ("adamw-fp8", {}, BF16, [(300, 768)], 468_000),
    ("adamw-fp8", {}, BF16, [(128, 32)], 8_320),
    ("adamw-fp8", {}, BF16, [(1600, 1600)], 80_000),
    ("came", {}, FP32, SMALL, 47_189_016),
    ("came", {}, BF16, SMALL, 56_626_200),
    ("came", {}, FP32, MIXED, 675_282_944),
    ("came", {}, BF16, MIXED, 855_638_016),
    ("sm3", {}, FP32, SMALL, 37_764_120),
    ("sm3", {}, BF16, SMALL, 18_882_072),
    ("sm3", {}, FP32, MIXED, 557_246_812),
    ("sm3", {}, BF16, MIXED, 192_968_320),
    ("sm3", {"momentum": "0.9"}, FP32, MIXED, 318_827_648),
    ("sm3", {"momentum": "0.9"}, BF16, MIXED, 159_413_888),
    ("galore", {}, FP32, MATRICES, 49_031_172),
    ("galore", {}, BF16, MATRICES, 56_895_492),
    ("galore", {}, FP32, SVD, 131_076_000),
    ("galore", {}, BF16, SVD, 65_538_000),
    ("apollo", {}, FP32, MATRICES, 28_323_844),
    ("apollo", {}, BF16, MATRICES, 17_307_650),
    ("apollo", {}, FP32, LOW_RANK, 394_570_756),
    ("apollo", {}, BF16, LOW_RANK, 224_403_458),
    ("soap", PORT, FP32, SMALL, 255_377_540),
    ("soap", PORT, BF16, SMALL, 211_724_420),
    ("soap", PORT, FP32, BASES, 446_759_044),
    ("soap", PORT, BF16, BASES, 369_156_228),
    ("flash-adamw", {}, BF16, SMALL, 0),
    ("flash-adamw", {"master": "none"}, FP32, SMALL, 0),
]


def _parameters(shapes: list[tuple[int, ...]]) -> list[Parameter]:
    return [
        Parameter(f"p{number}", shape, "token_embedding" if shape[:1] == (32000,) else "mlp", "linear")
        for number, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize(("id_", "options", "dtype", "shapes", "measured"), PEAKS)
def test_peak_of_the_temporaries(
    id_: str, options: dict[str, str], dtype: Any, shapes: list[tuple[int, ...]], measured: int, step_peak: Any
) -> None:
    model = build_optimizer(id_, options)
    assert step_peak(model, _parameters(shapes), OptimizerContext(dtype, dtype)) == measured
