"""No programs of a launch of MicroAdam disturb each other."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from optplan.optim_impls import MicroAdam

pytest.importorskip("triton")

_steps = runpy.run_path(str(Path(__file__).with_name("watched_steps.py")))
check, check_rank, IN_BF16, LR = (_steps[name] for name in ("check", "check_rank", "IN_BF16", "LR"))
FP32, BF16 = torch.float32, torch.bfloat16

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="memory is watched in Triton's interpreter")


def _micro_adam(**options: Any) -> Callable[..., torch.optim.Optimizer]:
    return lambda ps, backend: MicroAdam(ps, lr=LR, backend=backend, window=2, **options)


def _small_chunks(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Chunks of two blocks."""
    from optplan.optim_impls.micro_adam import launcher

    monkeypatch.setattr(launcher, "CHUNK_NUMEL", 2 * block)
    monkeypatch.setattr(launcher, "TableImage", partial(launcher.TableImage, chunk_numel=2 * block))


@pytest.mark.parametrize(
    ("block", "options", "dtype"),
    [
        (256, {"density": 0.04}, FP32),
        (2048, {"weight_decay": 0.1, "rounding": "stochastic"}, BF16),
        (1024, {"bucket": 32, "alpha": 0.25, "capturable": True}, BF16),
        (4096, {"bucket": 128, "density": 0.02, "weight_decay": 0.1}, FP32),
    ],
    ids=["small blocks", "stochastic", "dense", "large blocks"],
)
def test_small_chunks(monkeypatch: pytest.MonkeyPatch, block: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    _small_chunks(monkeypatch, block)
    shapes, tolerance = ((3 * block + 77,), (2, block // 2 + 9)), 1e-3 if dtype is FP32 else IN_BF16
    build = _micro_adam(block=block, **options)
    assert check(build, shapes, dtype=dtype, tolerance=tolerance, grad_scale=0.5) == {"select_kernel", "update_kernel"}


@pytest.mark.parametrize("rank", [0, 1])
def test_rows_on_two_ranks(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    _small_chunks(monkeypatch, 256)
    kernels = check_rank(_micro_adam(block=256, density=0.04), ((64, 24), (21, 37)), rank=rank)
    assert kernels == {"select_kernel", "update_kernel"}
