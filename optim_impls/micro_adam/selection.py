"""The selection: the largest elements of each block, exactly."""

from __future__ import annotations

import torch

LARGEST = 2.0**120
"""Magnitude from which an element counts as not finite: 128 levels of its bucket must not overflow bfloat16."""


def select_largest(accumulated: torch.Tensor, num_selected: int) -> torch.Tensor:
    """Indices `[blocks, num_selected]` of the largest magnitudes of each row, the largest first.

    Of equal magnitudes the lowest index comes first.

    Args:
        accumulated: `[blocks, numel]`.
        num_selected: Elements to select of each block.
    """
    return torch.sort(accumulated.abs(), dim=1, descending=True, stable=True).indices[:, :num_selected]


def finite_blocks(accumulated: torch.Tensor) -> torch.Tensor:
    """Which blocks `[blocks, 1]` hold only numbers below `LARGEST`; the others are skipped for a step."""
    return (accumulated.abs() < LARGEST).all(dim=1, keepdim=True)
