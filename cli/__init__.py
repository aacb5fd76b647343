"""optplan: how much memory a training step takes with each optimizer, before GPU hours are spent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optplan.planner.version import VERSION

if TYPE_CHECKING:
    from optplan.planner.estimate import estimate
    from optplan.profilers.live.session import profile_step

    LightningProfileCallback: type[Any]
    ProfileCallback: type[Any]

__version__ = VERSION

__all__ = ["LightningProfileCallback", "ProfileCallback", "__version__", "estimate", "profile_step"]

_CALLBACKS = {"LightningProfileCallback": "lightning_callback", "ProfileCallback": "trainer_callback"}
_MODULES = {"estimate": "optplan.planner.estimate", "profile_step": "optplan.profilers.live.session"}


def __getattr__(name: str) -> Any:
    """Load a function on first use, so that `import optplan` and `optplan --help` stay instant."""
    from importlib import import_module

    if name in _CALLBACKS:
        return getattr(import_module("optplan.profilers.live.callbacks"), _CALLBACKS[name])()
    if name not in _MODULES:
        raise AttributeError(f"module 'optplan' has no attribute {name!r}")
    import_module("optplan.notebook").show_in_notebooks()
    return getattr(import_module(_MODULES[name]), name)
