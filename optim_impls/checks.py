"""The argument checks that our optimizers share, in torch's manner: `ValueError` with the value received."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def check_at_least_zero(name: str, value: Any) -> None:
    """Raise ValueError unless `value` (a number or a scalar tensor) is zero or more; NaN is refused too."""
    if not float(value) >= 0:
        raise ValueError(f"{name} must be >= 0, got {float(value)}")


def check_fraction(name: str, value: Any) -> None:
    """Raise ValueError unless 0 <= `value` < 1."""
    if not 0 <= float(value) < 1:
        raise ValueError(f"{name} must be >= 0 and < 1, got {float(value)}")


def check_betas(betas: Any) -> None:
    """Raise ValueError unless `betas` are two decays."""
    if len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas}")
    for index, beta in enumerate(betas, start=1):
        check_fraction(f"beta{index}", beta)


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise ValueError unless `value` is among `choices`."""
    if value not in choices:
        listed = ", ".join(str(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}; got {value}")


def check_parameter(optimizer: str, parameter: torch.Tensor) -> None:
    """Raise TypeError unless `parameter` holds real floating-point numbers."""
    if not parameter.is_floating_point():
        raise TypeError(f"{optimizer} needs real floating-point parameters, got {parameter.dtype}")


def check_gradient(optimizer: str, gradient: torch.Tensor) -> None:
    """Raise RuntimeError, as torch does, for a gradient that no kernel of ours reads."""
    if gradient.is_sparse or gradient.layout is not torch.strided:
        raise RuntimeError(f"{optimizer} does not support sparse gradients")
    if gradient.is_complex():
        raise RuntimeError(f"{optimizer} does not support complex gradients")
