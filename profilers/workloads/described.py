"""A module's parameters in the planner's words."""

from __future__ import annotations

from torch import nn

from optplan.planner.tensors import Parameter


def described_parameters(module: nn.Module) -> tuple[Parameter, ...]:
    """Every parameter that is trained, with the role that the module's structure gives it."""
    from optplan.optim_impls.adam_mini.roles import describe_module

    return tuple(described.parameter for described in describe_module(module))
