"""What all tests share."""

from __future__ import annotations

import sys
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# An example may wait for a slow machine; how long a thing may take is tested where it is promised.
settings.register_profile("optplan", deadline=None)
settings.load_profile("optplan")


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands print as into a pipe, however wide the terminal is that the tests run in."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(autouse=True)
def _no_interpreted_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tests of the kernels interpret them; elsewhere the optimizers run in plain torch, far quicker."""
    if "optim_impls" not in request.path.parts:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(scope="session")
def fitting() -> ModuleType:
    """The script that fits the coefficients of step times."""
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    spec = util.spec_from_file_location("fit_step_time", ROOT / "benchmarks" / "fit_step_time.py")
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    sys.path.remove(folder)
    return module
