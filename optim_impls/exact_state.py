"""Loading of optimizer state bit by bit: torch's loader casts every state tensor to its parameter's dtype."""

from __future__ import annotations

from typing import Any

import torch


class Sealed:
    """A tensor that torch's loader does not recognise and so hands on as it is."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def seal(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A copy of an optimizer's state dict with every state tensor sealed."""
    states = {key: _map(value, torch.Tensor, Sealed) for key, value in state_dict["state"].items()}
    return {**state_dict, "state": states}


def unseal(state: dict[Any, Any], *, capturable: bool) -> None:
    """Replace sealed tensors by copies on the parameter's device, dtype and bits kept.

    Args:
        state: By parameter; changed in place.
        capturable: Whether step counters live on the parameter's device instead of the host.
    """
    for parameter, values in state.items():
        if not isinstance(values, dict):
            continue
        for name, value in values.items():
            on_host = name == "step" and not capturable
            device = "cpu" if on_host else getattr(parameter, "device", None)
            values[name] = _map(value, Sealed, lambda s, device=device: s.tensor.detach().to(device=device, copy=True))


def _map(value: Any, kind: type, change: Any) -> Any:
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(item, kind, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map(item, kind, change) for item in value)
    return value
