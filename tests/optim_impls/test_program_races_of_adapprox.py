"""No programs of a launch of Adapprox disturb each other."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from optplan.optim_impls import Adapprox

pytest.importorskip("triton")

_steps = runpy.run_path(str(Path(__file__).with_name("watched_steps.py")))
check, check_rank, LR = (_steps[name] for name in ("check", "check_rank", "LR"))
FP32, BF16 = torch.float32, torch.bfloat16

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="memory is watched in Triton's interpreter")


_OF_MATRICES = {
    "start_kernel", "sketch_kernel", "gram_kernel", "second_gram_kernel", "basis_kernel", "update_kernel",
    "again_kernel", "store_factors_kernel",
}  # fmt: skip
_OF_VECTORS = {"vector_moment_kernel", "vector_update_kernel"}


@pytest.fixture(name="small_bands", autouse=True)
def _small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of a hundred rows or columns are split in every way that large ones are."""
    from optplan.planner.optimizers import adapprox_layout

    monkeypatch.setattr(adapprox_layout, "BAND_NUMEL", 100)
    monkeypatch.setattr(adapprox_layout, "SHARE_ROWS", 64)


@pytest.mark.parametrize(
    ("options", "shapes", "dtype"),
    [
        ({"rank": 5}, ((130, 131), (66, 133), (9001,)), FP32),
        ({"rank": 16, "betas": (0.0, 0.999)}, ((201, 66), (6, 15, 13), (9001,)), BF16),
        ({"rank": 5, "capturable": True, "state_dtype": FP32}, ((136, 72), (70, 200)), BF16),
    ],
    ids=["fp32", "no first moment", "capturable"],
)
def test_small_bands(options: dict[str, Any], shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> None:
    kernels = check(
        lambda ps, backend: Adapprox(ps, lr=LR, backend=backend, **options), shapes, dtype=dtype, tolerance=2**-4
    )
    assert kernels == _OF_MATRICES | (_OF_VECTORS if (9001,) in shapes else set())


@pytest.mark.parametrize("rank", [0, 1])
def test_rows_on_two_ranks(rank: int) -> None:
    shapes = ((201, 131), (150, 70), (1, 9))
    assert (
        check_rank(lambda ps, backend: Adapprox(ps, lr=LR, rank=5, backend=backend), shapes, rank=rank) == _OF_MATRICES
    )
