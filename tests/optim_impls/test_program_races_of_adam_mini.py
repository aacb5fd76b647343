"""No programs of a launch of Adam-mini disturb each other."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from optplan.optim_impls import AdamMini
from optplan.planner.tensors import HeadLayout, ModuleKind, Parameter, Role

pytest.importorskip("triton")

_steps = runpy.run_path(str(Path(__file__).with_name("watched_steps.py")))
check, check_rank, IN_BF16, LR = (_steps[name] for name in ("check", "check_rank", "IN_BF16", "LR"))

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="memory is watched in Triton's interpreter")


def _described(
    role: Role,
    shape: tuple[int, ...],
    heads: HeadLayout | None = None,
    *,
    module: ModuleKind = "linear",
    output_axes: tuple[int, ...] = (0,),
) -> Parameter:
    return Parameter(role, shape, role, module, output_axes, heads)


def _fused(*, heads: int, interleaved: bool = False) -> HeadLayout:
    """Twice as many heads in all as of queries, of 26 neurons."""
    return HeadLayout(26, heads, heads // 2, heads // 2, interleaved=interleaved)


_CONV1D: dict[str, Any] = {"module": "conv1d", "output_axes": (1,)}
_ROWS = tuple(_described("mlp", (24_000 // width + 3, width)) for width in (37, 101, 384, 768, 896, 1000, 1280, 1600))
_BLOCKS = (
    _described("bias", (4097,)),
    _described("query", (78, 1300), HeadLayout(26, num_query_heads=3)),
    _described("query", (52, 400), HeadLayout(4, num_query_heads=13)),
    _described("fused_qkv", (312, 333), _fused(heads=6)),
    _described("fused_qkv", (104, 333), _fused(heads=2, interleaved=True)),
    _described("output_head", (3, 20_001)),
    _described("other", (17_001,)),
    _described("patch_embedding", (131, 3, 7, 7), module="conv2d"),
    _described("mlp", (5, 61, 77), output_axes=(0, 1), module="experts"),
)
_COLUMNS = (
    _described("mlp", (75, 77), **_CONV1D),
    _described("mlp", (48, 80), **_CONV1D),
    _described("fused_qkv", (75, 104), _fused(heads=2), **_CONV1D),
    _described("fused_qkv", (67, 104), _fused(heads=2, interleaved=True), **_CONV1D),
    _described("mlp", (3, 34, 40), output_axes=(0, 2), module="experts"),
)
_OF_SEGMENTS = {"segment_sums_kernel", "segment_moments_kernel", "segment_update_kernel"}
_OF_COLUMNS = {"column_sums_kernel", "column_moments_kernel", "column_update_kernel"}


def _adam_mini(described: Sequence[Parameter], **options: Any) -> Callable[..., torch.optim.Optimizer]:
    def build(parameters: list[torch.nn.Parameter], backend: str) -> torch.optim.Optimizer:
        roles = dict(zip(parameters, described, strict=True))
        return AdamMini(parameters, roles=roles, lr=LR, backend=backend, **options)

    return build


@pytest.fixture(name="small_chunks")
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of which none holds whole tiles: 475 rows of 37 in tiles of 64, 11 rows of 1600 in tiles of 2."""
    from optplan.optim_impls.adam_mini import launcher
    from optplan.planner.optimizers import adam_mini_work

    for module in (launcher, adam_mini_work):
        monkeypatch.setattr(module, "ROW_CHUNK_NUMEL", 17_600)
        monkeypatch.setattr(module, "COLUMN_TILE", 32)


@pytest.mark.parametrize(
    ("described", "kernels"),
    [
        (_ROWS, {"rows_kernel"}),
        (_BLOCKS, {"rows_kernel", "elements_kernel", *_OF_SEGMENTS}),
        (_COLUMNS, _OF_COLUMNS),
    ],
    ids=["rows", "blocks", "columns"],
)
@pytest.mark.usefixtures("small_chunks")
def test_small_chunks(described: Sequence[Parameter], kernels: set[str]) -> None:
    assert check(_adam_mini(described), [p.shape for p in described]) == kernels


@pytest.mark.usefixtures("small_chunks")
def test_capturable_and_stochastic() -> None:
    described = (_ROWS[0], _ROWS[5], _BLOCKS[0], _BLOCKS[6], _COLUMNS[3])
    build = _adam_mini(described, rounding="stochastic", capturable=True)
    check(build, [p.shape for p in described], dtype=torch.bfloat16, tolerance=IN_BF16)


def test_chunks_as_they_are() -> None:
    rows = (_described("mlp", shape) for shape in ((140, 1000), (2000, 37)))
    described = (*rows, _described("mlp", (130, 150), **_CONV1D))
    check(_adam_mini(described), [p.shape for p in described])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.usefixtures("small_chunks")
def test_rows_on_two_ranks(rank: int) -> None:
    described = (_ROWS[0], *_BLOCKS[1:3], *_BLOCKS[4:6], *_COLUMNS[:3])
    kernels = check_rank(_adam_mini(described), [p.shape for p in described], rank=rank)
    assert kernels == {"rows_kernel", *_OF_SEGMENTS, *_OF_COLUMNS}
