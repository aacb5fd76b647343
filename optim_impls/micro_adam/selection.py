"""The selection: the largest elements of each block, exactly."""

from __future__ import annotations

import torch

from optplan.optim_impls.micro_adam.layout import RUN_NUMEL

LARGEST = 2.0**126
"""Magnitude from which an element counts as not finite: beyond it the range of a bucket may overflow float32."""


def select_largest(accumulated: torch.Tensor, num_selected: int, *, num_buckets: int) -> torch.Tensor:
    """Indices `[blocks, num_selected]` of the largest magnitudes of each row; ties go to the lowest index.

    They come bucket by bucket, ascending within: the order in which the threads of the kernel hold them.

    Args:
        accumulated: `[blocks, numel]`.
        num_selected: Elements to select of each block.
        num_buckets: Buckets of a block.
    """
    order = torch.sort(accumulated.abs(), dim=1, descending=True, stable=True).indices[:, :num_selected]
    bucket = order // RUN_NUMEL % num_buckets
    return order.gather(1, (bucket * accumulated.shape[1] + order).argsort(dim=1))


def finite_blocks(accumulated: torch.Tensor) -> torch.Tensor:
    """Which blocks `[blocks, 1]` hold only numbers below `LARGEST`; the others are skipped for a step."""
    return (accumulated.abs() < LARGEST).all(dim=1, keepdim=True)
