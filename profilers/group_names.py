"""Names of what FSDP2 makes for a group of parameters, the same for traced and for measured steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def reduced_gradient_names(groups: Iterable[Any]) -> dict[int, str]:
    """Names of the memory that holds a group's reduced gradients, by the ids of the group's sharded parameters.

    Args:
        groups: torch's `FSDPParamGroup`s; their modules' names are known once a forward has been.
    """
    return {
        id(parameter.sharded_param): f"{group._module_fqn or 'root'} reduced gradients"
        for group in groups
        for parameter in group.fsdp_params
    }
