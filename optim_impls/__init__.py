"""The optimizers themselves (torch and triton), each imported when it is first asked for."""

from __future__ import annotations

import importlib
from typing import Any

_CLASSES = {
    "AdamMini": "optplan.optim_impls.adam_mini.optimizer",
    "AdamW": "optplan.optim_impls.adamw.optimizer",
    "Adapprox": "optplan.optim_impls.adapprox.optimizer",
    "MicroAdam": "optplan.optim_impls.micro_adam.optimizer",
}

__all__ = ["AdamMini", "AdamW", "Adapprox", "MicroAdam"]


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_CLASSES[name]), name)


def __dir__() -> list[str]:
    return sorted(_CLASSES)
