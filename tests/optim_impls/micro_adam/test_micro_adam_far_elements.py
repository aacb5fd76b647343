"""Blocks that lie beyond 2^32 elements of their tensor: a launch table that says so, over tensors that are small."""

from __future__ import annotations

import torch

from optplan.optim_impls.micro_adam.launcher import MicroAdamLaunch
from optplan.optim_impls.micro_adam.layout import layout_of
from optplan.optim_impls.micro_adam.reference import Hyperparameters

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK, BUCKET, WINDOW, DENSITY, NUMEL = 256, 8, 2, 0.04, 256 + 57
SELECTED = 11  # of a block


def _state() -> list[torch.Tensor]:
    layout = layout_of(NUMEL, block=BLOCK, bucket=BUCKET, window=WINDOW, density=DENSITY)
    of_buckets = {"size": (layout.num_buckets,), "dtype": torch.bfloat16, "device": DEVICE}
    return [
        torch.zeros(layout.num_codes, dtype=torch.uint8, device=DEVICE),
        torch.zeros(**of_buckets),
        torch.zeros(**of_buckets),
        torch.zeros(layout.num_window, dtype=torch.int16, device=DEVICE),
        torch.zeros(layout.num_window, dtype=torch.bfloat16, device=DEVICE),
    ]


def _steps(first: int) -> list[torch.Tensor]:
    """A step over the elements of a tensor from `first` on; where it would begin lies far before them."""
    generator = torch.Generator().manual_seed(0)
    parameter, gradient = (torch.randn(NUMEL, generator=generator).to(DEVICE) for _ in range(2))
    state = _state()
    layout = layout_of(NUMEL, block=BLOCK, bucket=BUCKET, window=WINDOW, density=DENSITY)
    launch = MicroAdamLaunch([[parameter, gradient, *state]], [3], layout=layout, aligned=True, capturable=False)
    table, blocks = launch._image._views(launch._image._image), first // BLOCK
    entries = blocks * WINDOW * SELECTED
    before = [4 * first, 4 * first, first // 2, *[2 * blocks * BLOCK // BUCKET] * 2, *[2 * entries] * 2]
    table.rows[0, :-2] -= torch.tensor(before)
    table.rows[0, -2] += first
    table.chunk_offset.add_(first)
    hyper = Hyperparameters(0.1, weight_decay=0.1, alpha=0.25)
    launch(step=2, hyper=hyper, seed=0, scale=None)
    return [parameter, *state]


def test_far_elements_are_stepped_as_near_ones() -> None:
    for far, near in zip(_steps(3 * 2**32 + 2**31), _steps(0), strict=True):
        assert torch.equal(far, near)
