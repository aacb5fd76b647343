"""Processes that each run `python -m MODULE`: forked from one that has imported everything, or started from nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

import msgspec

from optplan.profilers.validation import fork_server
from optplan.profilers.validation.fork_server import Answer, Ended, Order, Ready, Signal, Start

READY_SECONDS = 120.0
"""After which a server that has not imported everything is given up."""
_GRACE_SECONDS = 20.0
_POLL_SECONDS = 0.02
_LAST_LINE = 300
INTERRUPTED = fork_server.INTERRUPTED
"""Exit status of an interrupted process."""


class Process:
    """A running process whose output is kept in files."""

    def __init__(self, job: Job, folder: Path, number: int) -> None:
        self._job = job
        self._output, self._errors = paths_of(folder, number)

    @property
    def status(self) -> int | None:
        """Its exit status, None while it runs."""
        return self._job.status

    @property
    def output(self) -> str:
        """What it has printed."""
        return _text(self._output)

    def last_words(self) -> str:
        """The last line of its errors, or its status where it said nothing."""
        said = [line for line in _text(self._errors).splitlines() if line.strip()]
        return said[-1][:_LAST_LINE] if said else f"the process ended with status {self.status}"

    def signal(self, number: int) -> None:
        """Send a signal to it and all it has started."""
        self._job.signal(number)

    def wait(self, seconds: float) -> bool:
        """Whether it ends within so long."""
        deadline = time.monotonic() + seconds
        while self.status is None and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return self.status is not None


class Job(Protocol):
    """What a launcher knows of a process."""

    @property
    def status(self) -> int | None:
        """Exit status, None while it runs."""
        ...

    def signal(self, number: int) -> None:
        """Send a signal to its group."""
        ...


class Launcher(Protocol):
    """Starts processes.

    Attributes:
        probed: What the probe printed, None where it was not run.
    """

    probed: str | None

    def start(self, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Process:
        """Run `python -m module` with these arguments, and these variables added."""
        ...


@contextmanager
def launching(preload: Sequence[Sequence[str]], *, probe: str | None = None) -> Iterator[Launcher]:
    """A launcher; at the end of the context what still runs is killed.

    Args:
        preload: What a server imports before it forks, the richest list first; a list after which CUDA could not be
            used is passed over. Where none is left, or a system does not fork, every process starts from nothing.
        probe: A module that children must be able to run; a list after which they are not is passed over, too.
    """
    with tempfile.TemporaryDirectory(prefix="optplan-") as name:
        launcher = _launcher(preload, Path(name), probe)
        try:
            yield launcher
        finally:
            launcher.close()


def end(processes: Sequence[Process]) -> None:
    """Interrupt processes as Ctrl-C would, and kill those that go on."""
    for number in (signal.SIGINT, signal.SIGKILL):
        _signal_all(processes, number)


def kill(processes: Sequence[Process]) -> None:
    """End processes at once."""
    _signal_all(processes, signal.SIGKILL)


def _signal_all(processes: Sequence[Process], number: int) -> None:
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in processes:
        if process.status is None:
            process.signal(number)
    for process in processes:
        process.wait(deadline - time.monotonic())


def paths_of(folder: Path, number: int) -> tuple[Path, Path]:
    """Files of a process's output and errors."""
    return folder / f"{number}.out", folder / f"{number}.err"


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""


def _launcher(preload: Sequence[Sequence[str]], folder: Path, probe: str | None) -> ForkLauncher | PlainLauncher:
    for names in preload if hasattr(os, "fork") and sys.platform != "darwin" else ():
        forking = ForkLauncher(names, folder)
        if forking.is_ready() and (probe is None or _runs(forking, probe)):
            return forking
        forking.close()
    return PlainLauncher(folder)


def _runs(launcher: ForkLauncher, module: str) -> bool:
    process = launcher.start(module, [], {})
    is_done = process.wait(READY_SECONDS) and process.status == 0
    launcher.probed = process.output if is_done else None
    return is_done


class PlainLauncher:
    """Starts each process from nothing."""

    def __init__(self, folder: Path) -> None:
        self.probed: str | None = None
        self._folder = folder
        self._started: list[_Child] = []

    def start(self, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Process:
        """Run `python -m module`."""
        number = len(self._started)
        output, errors = paths_of(self._folder, number)
        words = [sys.executable, "-m", module, *arguments]
        with output.open("wb") as out, errors.open("wb") as err:
            child = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        self._started.append(_Child(child))
        return Process(self._started[-1], self._folder, number)

    def close(self) -> None:
        """Kill what still runs."""
        for child in self._started:
            if child.status is None:
                child.signal(signal.SIGKILL)


class _Child:
    """A process of our own."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child

    @property
    def status(self) -> int | None:
        return self._child.poll()

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child.pid, number)


class ForkLauncher:
    """Starts processes as children of a `fork_server`."""

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        """Start the server, which goes on importing while the caller does other things."""
        self.probed: str | None = None
        self._folder = folder
        self._jobs: list[_Forked] = []
        self._ready = threading.Event()
        self._is_clean = False
        words = [sys.executable, "-m", "optplan.profilers.validation.fork_server", *names]
        with (folder / "server.err").open("ab") as errors:
            self._server = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def is_ready(self) -> bool:
        """Wait for the server; whether its children can use CUDA."""
        return self._ready.wait(READY_SECONDS) and self._is_clean

    def start(self, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Process:
        """Run `python -m module`."""
        number = len(self._jobs)
        job = _Forked(number, self)
        self._jobs.append(job)
        output, errors = paths_of(self._folder, number)
        self.order(Start(number, module, list(arguments), dict(environment), str(output), str(errors)))
        return Process(job, self._folder, number)

    def order(self, order: Order) -> None:
        """Tell the server; one that is gone has ended its children."""
        with contextlib.suppress(BrokenPipeError, ValueError):
            pipe = self._pipe(self._server.stdin)
            pipe.write(msgspec.json.encode(order) + b"\n")
            pipe.flush()

    def close(self) -> None:
        """End the server and with it what still runs."""
        with contextlib.suppress(BrokenPipeError):
            self._pipe(self._server.stdin).close()
        try:
            self._server.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._reader.join(_GRACE_SECONDS)

    def _read(self) -> None:
        """Note the server's answers until it ends; then nothing runs any more."""
        for line in self._pipe(self._server.stdout):
            answer = msgspec.json.decode(line, type=Answer)
            if isinstance(answer, Ready):
                self._is_clean = answer.is_clean
                self._ready.set()
            elif isinstance(answer, Ended):
                self._jobs[answer.id].status = answer.status
        self._ready.set()
        for job in self._jobs:
            if job.status is None:
                job.status = -signal.SIGKILL

    @staticmethod
    def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
        assert stream is not None
        return stream


class _Forked:
    """A child of the server."""

    def __init__(self, number: int, launcher: ForkLauncher) -> None:
        self.status: int | None = None
        self._number, self._launcher = number, launcher

    def signal(self, number: int) -> None:
        self._launcher.order(Signal(self._number, number))
