"""A process that has imported what measurements need, and forks a child for each; itself it never touches a GPU.

    python -m optplan.profilers.validation.fork_server NAME ...

Each NAME is a module to import, or `module:attribute` where attributes are loaded when they are asked for. Orders come
as lines of JSON on stdin, answers go as lines to stdout: first `Ready`, then for each child one `Ended`. A child runs a
module as `python -m` would, in a group of its own, with its output in files. When stdin ends, so do all children.

A child that initialises CUDA must not come from a process that did: `Ready.is_clean` says whether a child may.
"""

from __future__ import annotations

import contextlib
import gc
import os
import runpy
import selectors
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

import msgspec

from optplan.profilers.validation.told_gpus import told_gpus

INTERRUPTED = 130
_BROKEN = 70


class Start(msgspec.Struct, frozen=True, tag=True):
    """Run a module in a new child.

    Attributes:
        id: What the answer names it by.
        module: Run as `python -m module`.
        arguments: Its command line.
        environment: Variables added to the server's.
        output: File for its stdout; `errors` likewise for its stderr.
    """

    id: int
    module: str
    arguments: list[str]
    environment: dict[str, str]
    output: str
    errors: str


class Signal(msgspec.Struct, frozen=True, tag=True):
    """Send a signal to a child and what it has started."""

    id: int
    number: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """All is imported; `is_clean` says whether a child can use CUDA."""

    is_clean: bool


class Ended(msgspec.Struct, frozen=True, tag=True):
    """A child's exit status; of one ended by a signal, the signal's number below 0."""

    id: int
    status: int


Order = Start | Signal
Answer = Ready | Ended


def preload(names: Sequence[str]) -> None:
    """Import what is there of `names`; of what is missing a child tells itself."""
    for name in names:
        module, _, attribute = name.partition(":")
        with contextlib.suppress(ImportError, AttributeError, RuntimeError, OSError):
            loaded = import_module(module)
            if attribute:
                getattr(loaded, attribute)


class _Server:
    def __init__(self, answers: int, num_threads: int | None) -> None:
        self._answers = answers
        self._num_threads = num_threads
        self._selector = selectors.DefaultSelector()
        self._children: dict[int, int] = {}
        """Processes by id of their order."""

    def serve(self) -> None:
        """Obey until stdin ends."""
        self._selector.register(0, selectors.EVENT_READ)
        rest = b""
        while True:
            for key, _ in self._selector.select():
                if key.fd != 0:
                    self._reap(key.fd, key.data)
                    continue
                received = os.read(0, 1 << 16)
                if not received:
                    self._end_all()
                    return
                *lines, rest = (rest + received).split(b"\n")
                for line in lines:
                    self._obey(msgspec.json.decode(line, type=Order))

    def answer(self, answer: Answer) -> None:
        """Write a line."""
        os.write(self._answers, msgspec.json.encode(answer) + b"\n")

    def _obey(self, order: Order) -> None:
        if isinstance(order, Start):
            self._start(order)
        elif order.id in self._children:
            _signal_group(self._children[order.id], order.number)

    def _start(self, order: Start) -> None:
        # The child holds the other end until it is gone, whatever ends it.
        alive, held = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(alive)
            os.close(self._answers)
            self._selector.close()
            _run_child(order, self._num_threads)
        os.close(held)
        with contextlib.suppress(OSError):
            os.setpgid(process, process)
        self._children[order.id] = process
        self._selector.register(alive, selectors.EVENT_READ, order.id)

    def _reap(self, pipe: int, id_: int) -> None:
        self._selector.unregister(pipe)
        os.close(pipe)
        _, status = os.waitpid(self._children.pop(id_), 0)
        self.answer(Ended(id_, os.waitstatus_to_exitcode(status)))

    def _end_all(self) -> None:
        for process in self._children.values():
            _signal_group(process, signal.SIGKILL)


def _signal_group(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process, number)


def _run_child(order: Start, num_threads: int | None) -> None:
    """Become `python -m module` and end; never returns."""
    status = _BROKEN
    try:
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _redirect(order)
        os.environ |= order.environment
        if num_threads is not None:
            sys.modules["torch"].set_num_threads(num_threads)
        sys.argv = [order.module, *order.arguments]
        status = _exit_status(order.module)
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BaseException:  # whatever is wrong, a child ends here and does not go on to serve
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _exit_status(module: str) -> int:
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            sys.stderr.write(f"{stop.code}\n")
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _redirect(order: Start) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for target, path, mode in ((0, os.devnull, os.O_RDONLY), (1, order.output, flags), (2, order.errors, flags)):
        source = os.open(path, mode, 0o600)
        os.dup2(source, target)
        os.close(source)


def _may_fork_for_cuda() -> bool:
    """Whether torch would initialise CUDA in a child; torch notes a fork after its driver was asked anything."""
    torch = sys.modules.get("torch")
    if torch is None:
        return True
    if torch.cuda.is_initialized():
        return False
    process = os.fork()
    if process == 0:
        os._exit(int(torch.cuda._is_in_bad_fork()))
    return os.waitpid(process, 0)[1] == 0


def main(names: Sequence[str]) -> None:
    """Import, say so, and serve."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.dup(1)
    os.dup2(2, 1)  # what packages print while they are imported is no answer
    # Packages that ask torch for a GPU while they are imported would initialise CUDA here; NVML tells as well.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    preload(names[:1])
    torch, num_threads = sys.modules.get("torch"), None
    if torch is not None:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # threads do not live on in a child
    with told_gpus(torch) if torch is not None else contextlib.nullcontext():
        preload(names[1:])
    gc.collect()
    gc.freeze()  # children look for garbage among their own objects alone
    server = _Server(answers, num_threads)
    server.answer(Ready(_may_fork_for_cuda()))
    server.serve()


if __name__ == "__main__":
    main(sys.argv[1:])
