"""A process in which packages ask torch for GPUs while they are imported, and which still touches none."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import pytest

from optplan.profilers.validation import launching
from optplan.profilers.validation.launching import ForkLauncher
from optplan.profilers.validation.told_gpus import told_gpus

CUDA = """
import sys, types

class _C:
    _cuda_getDevice = staticmethod(lambda: 1)

num_gpus, initialised = 2, []

def is_available():
    return num_gpus > 0

def device_count():
    if num_gpus > 2:
        raise RuntimeError("no driver")
    return num_gpus

def _lazy_init():
    global _get_device_properties
    initialised.append(True)
    _get_device_properties = lambda index: types.SimpleNamespace(name=f"GPU {index}", major=9, uuid=object, _own=1)

def get_device_properties(index):
    _lazy_init()
    return _get_device_properties(index)

def current_device():
    _lazy_init()
    return _C._cuda_getDevice()
"""
TORCH = """
import sys
from torch import cuda
_C = cuda._C
cuda.is_initialized = lambda: bool(cuda.initialised)
cuda._is_in_bad_fork = lambda: bool(cuda.initialised)
get_num_threads = lambda: 2
set_num_threads = lambda number: None
"""


@pytest.fixture
def torch() -> ModuleType:
    module, module.cuda = ModuleType("torch"), ModuleType("torch.cuda")  # type: ignore[assignment]
    exec(CUDA, vars(module.cuda))
    module._C = module.cuda._C  # type: ignore[attr-defined]
    return module


def test_a_child_asks_and_nothing_is_initialised_here(torch: ModuleType) -> None:
    before = dict(vars(torch.cuda))
    with told_gpus(torch):
        told = [torch.cuda.get_device_properties(index) for index in range(2)]
        assert [(gpu.name, gpu.major, hasattr(gpu, "_own")) for gpu in told] == [
            ("GPU 0", 9, False), ("GPU 1", 9, False),
        ]  # fmt: skip
        assert isinstance(told[0].uuid, str)
        assert torch.cuda.current_device() == 0
        assert torch.cuda.initialised == []
    assert dict(vars(torch.cuda)) == before
    # Afterwards torch answers by itself again.
    assert torch.cuda.current_device() == 1
    assert torch.cuda.initialised == [True]


@pytest.mark.parametrize(("num_gpus", "replaced"), [(0, False), (3, True)])
def test_where_nothing_is_told_torch_answers(torch: ModuleType, num_gpus: int, replaced: bool) -> None:
    torch.cuda.num_gpus, original = num_gpus, torch.cuda._lazy_init
    with told_gpus(torch):
        assert (torch.cuda._lazy_init is not original) == replaced
        torch.cuda._lazy_init()
        assert torch.cuda.initialised == [True]
    assert torch.cuda._lazy_init is original


def test_a_package_that_asks_spoils_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(TORCH)
    (tmp_path / "torch" / "cuda.py").write_text(CUDA)
    (tmp_path / "asking.py").write_text("import torch\nMAJOR = torch.cuda.get_device_properties(1).major\n")
    (tmp_path / "job.py").write_text("import asking, torch\nprint(asking.MAJOR, torch.cuda.initialised)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with launching.launching([["torch", "asking"]], probe="asking") as launcher:
        assert isinstance(launcher, ForkLauncher)
        process = launcher.start("job", [], {})
        assert process.wait(20)
        assert process.output == "9 []\n"
