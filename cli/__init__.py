"""optplan: how much memory a training step takes with each optimizer, before GPU hours are spent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optplan.planner.version import VERSION

if TYPE_CHECKING:
    from optplan.planner.estimate import estimate

__version__ = VERSION

__all__ = ["__version__", "estimate"]


def __getattr__(name: str) -> Any:
    """Load `estimate` on first use, so that `import optplan` and `optplan --help` stay instant."""
    if name == "estimate":
        from optplan.planner.estimate import estimate

        return estimate
    raise AttributeError(f"module 'optplan' has no attribute {name!r}")
