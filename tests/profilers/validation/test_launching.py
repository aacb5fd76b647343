"""Processes forked from a server or started from nothing: both run a module, tell how it ended, and can be stopped."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from optplan.profilers.validation import launching
from optplan.profilers.validation.launching import ForkLauncher, Launcher, PlainLauncher, Process

MODULE = """
import os, sys, time
what, *rest = sys.argv[1:]
if what == "tell":
    print(__name__, os.environ["COLOUR"], os.getpgid(0) == os.getpid(), "preloaded" in sys.modules)
elif what == "fail":
    sys.exit("it cannot be done")
elif what == "raise":
    raise RuntimeError("broken")
elif what == "sleep":
    if "stubborn" in rest:
        import signal
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    print(os.getpid(), flush=True)
    time.sleep(60)
elif what == "die":
    os.kill(os.getpid(), 9)
"""
TORCH = """
class cuda:
    is_available = is_initialized = staticmethod(lambda: False)
    _is_in_bad_fork = staticmethod(lambda: "poisoned" in __import__("sys").modules)
get_num_threads = lambda: 2
set_num_threads = lambda number: print(f"threads {number}")
"""


@pytest.fixture(params=["fork", "plain"])
def launcher(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launcher]:
    (tmp_path / "job.py").write_text(MODULE)
    (tmp_path / "preloaded.py").write_text("print('this is no answer')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with launching.launching([["preloaded", "missing"]] if request.param == "fork" else []) as made:
        assert isinstance(made, ForkLauncher if request.param == "fork" else PlainLauncher)
        yield made


def _told(process: Process) -> str:
    deadline = time.monotonic() + 20
    while not process.output and time.monotonic() < deadline:
        time.sleep(0.01)
    return process.output


def test_a_module_is_run_as_by_python(launcher: Launcher) -> None:
    process = launcher.start("job", ["tell"], {"COLOUR": "red"})
    assert process.wait(20)
    assert process.status == 0
    assert process.output == f"__main__ red True {isinstance(launcher, ForkLauncher)}\n"
    assert "COLOUR" not in os.environ


@pytest.mark.parametrize(
    ("what", "status", "last"),
    [("fail", 1, "it cannot be done"), ("raise", None, "RuntimeError: broken"), ("die", -9, None)],
)
def test_how_it_ends(launcher: Launcher, what: str, status: int | None, last: str | None) -> None:
    process = launcher.start("job", [what], {})
    assert process.wait(20)
    assert process.status == status if status is not None else process.status not in (0, None)
    assert process.last_words() == (last or "the process ended with status -9")


def test_several_run_at_once_and_are_interrupted(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    running = [launcher.start("job", ["sleep"], {}) for _ in range(2)]
    assert len({_told(process) for process in running}) == 2
    assert [process.status for process in running] == [None, None]
    launching.end(running)
    assert [process.status in (launching.INTERRUPTED, 1, -signal.SIGINT) for process in running] == [True, True]


def test_what_does_not_listen_is_killed(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_GRACE_SECONDS", 0.3)
    process = launcher.start("job", ["sleep", "stubborn"], {})
    _told(process)
    launching.end([process])
    assert process.status == -signal.SIGKILL


def test_children_end_with_their_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with launching.launching([["json"]]) as launcher:
        process = launcher.start("job", ["sleep"], {})
        number = int(_told(process))
    assert process.status == -signal.SIGKILL
    deadline = time.monotonic() + 5
    while Path(f"/proc/{number}").exists() and "Z" not in Path(f"/proc/{number}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_server_that_asked_for_a_gpu_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "poisoned.py").write_text("")
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / "job.py").write_text("print(__name__)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with launching.launching([["torch", "poisoned"], ["torch"]]) as launcher:
        assert isinstance(launcher, ForkLauncher)
        process = launcher.start("job", [], {})
        assert process.wait(20) and process.output == "threads 2\n__main__\n"
    with launching.launching([["torch", "poisoned"]]) as plain:
        assert isinstance(plain, PlainLauncher)


def test_a_server_whose_children_cannot_do_what_is_needed_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "harmful.py").write_text("")
    (tmp_path / "probe.py").write_text("import sys\nprint('told')\nsys.exit('harmful' in sys.modules)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with launching.launching([["harmful"], ["json"]], probe="probe") as launcher:
        assert isinstance(launcher, ForkLauncher) and launcher.start("probe", [], {}).wait(20)
        assert launcher.probed == "told\n"
    with launching.launching([["harmful"]], probe="probe") as plain:
        assert isinstance(plain, PlainLauncher) and plain.probed is None
