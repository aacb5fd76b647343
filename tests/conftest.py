"""What all tests share."""

from __future__ import annotations

import pytest
from hypothesis import settings

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
