"""Launches of Triton kernels, which compute nothing without contents: what they write to is allocated around them.

Whatever a module or a package launches itself, jitted, autotuned or behind heuristics, is left out within the context;
its Python code allocates inputs and outputs as on a GPU. The buffer by which the autotuner clears caches, in a kernel's
first launches, is not seen.

Source: triton `runtime/jit.py` (`KernelInterface`), `runtime/autotuner.py`, `runtime/interpreter.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from optplan.profilers.tracing.cuda_environment import replaced


@contextmanager
def without_launches() -> Iterator[None]:
    """Within the context no Triton kernel runs, in whatever way it is launched; nothing to do without triton."""
    try:
        from triton.runtime.jit import KernelInterface
    except ImportError:
        yield
        return
    with ExitStack() as stack:
        for kind in _kinds(KernelInterface):
            stack.enter_context(replaced(kind, "run", _run_nothing))
        yield


def _kinds(kind: type[Any]) -> Iterator[type[Any]]:
    """The classes of kernels that launch in a way of their own."""
    if "run" in vars(kind):
        yield kind
    for narrower in kind.__subclasses__():
        yield from _kinds(narrower)


def _run_nothing(*args: Any, **kwargs: Any) -> None:
    del args, kwargs
