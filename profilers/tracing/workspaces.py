"""The workspaces that cuBLAS keeps: one a thread, made by the thread's first matrix product and never freed.

Source: pytorch `aten/src/ATen/cuda/CublasHandlePool.cpp` (`parseChosenWorkspaceSize`), `CUDABlas.cpp`; sizes as
recorded on an H200.
"""

from __future__ import annotations

from typing import Any

import torch

from optplan.planner.step.options import HOPPER
from optplan.planner.units import KIB, MIB
from optplan.profilers.tracing.recorder import Recorder

aten = torch.ops.aten

_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
_HOPPER_WORKSPACE, _WORKSPACE = 32 * MIB, 2 * 4096 * KIB + 8 * 16 * KIB
_LT_WORKSPACE = MIB


class Workspaces:
    """Makes each thread's workspaces when they are first needed.

    The forward runs in one thread, the backward in another; a product with a bias of one dimension runs in cublasLt,
    which has a workspace of its own.
    """

    def __init__(self, recorder: Recorder, capability: tuple[int, int]) -> None:
        self._recorder = recorder
        self._size = _HOPPER_WORKSPACE if capability == HOPPER else _WORKSPACE
        self._made: set[tuple[str, str]] = set()

    def serve(self, func: Any, args: tuple[Any, ...]) -> None:
        """Record the workspaces that this operation makes."""
        if func not in _PRODUCTS:
            return
        thread = "backward" if self._recorder.phase == "backward" else "forward"
        self._make(thread, "cuBLAS", self._size)
        if func is aten.addmm.default and args[0].dim() == 1:
            self._make(thread, "cuBLASLt", _LT_WORKSPACE)

    def _make(self, thread: str, library: str, num_bytes: int) -> None:
        if (thread, library) not in self._made:
            self._made.add((thread, library))
            self._recorder.alloc(num_bytes, "workspace", f"{library} workspace of the {thread}")
