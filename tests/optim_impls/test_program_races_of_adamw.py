"""No programs of a launch of AdamW disturb each other."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from optplan.optim_impls import AdamW

pytest.importorskip("triton")

_steps = runpy.run_path(str(Path(__file__).with_name("watched_steps.py")))
check, EXACTLY, IN_BF16, LR = (_steps[name] for name in ("check", "EXACTLY", "IN_BF16", "LR"))
FP32, BF16 = torch.float32, torch.bfloat16

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="memory is watched in Triton's interpreter")


@pytest.fixture(name="small_spans")
def _small_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of four programs, each of blocks and tails, as a GPU has them."""
    from optplan.optim_impls.adamw import launcher

    monkeypatch.setattr(launcher, "CHUNK_NUMEL", 2048)
    monkeypatch.setattr(launcher, "SPAN", 512)
    for name, size in {"CHUNK": 2048, "SPAN": 512, "BLOCK": 256, "TAIL": 64}.items():
        monkeypatch.setitem(launcher._SHAPE, name, size)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, FP32),
        ({"capturable": True}, BF16),
        ({"rounding": "stochastic"}, BF16),
        ({"rounding": "kahan"}, BF16),
    ],
    ids=["fp32", "capturable", "stochastic", "kahan"],
)
@pytest.mark.usefixtures("small_spans")
def test_small_chunks(options: dict[str, Any], dtype: torch.dtype) -> None:
    shapes = ((4501,), (37, 61), (2 * 2048,), (2048 + 5,))
    tolerance = EXACTLY if dtype is FP32 else IN_BF16
    kernels = check(
        lambda ps, backend: AdamW(ps, lr=LR, backend=backend, **options), shapes, dtype=dtype, tolerance=tolerance
    )
    assert kernels == {"adamw_kernel"}


def test_chunks_as_they_are() -> None:
    check(lambda ps, backend: AdamW(ps, lr=LR, backend=backend), [(65536 + 40_001,), (301, 110)])
