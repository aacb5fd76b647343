"""Results to stdout: one JSON document, or text for the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from optplan.planner.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console


def print_json(record: object) -> None:
    """Print a record as one indented JSON document, in ASCII so that no locale can spoil it."""
    import json

    import msgspec

    text = json.dumps(msgspec.to_builtins(record), indent=2)
    _deliver(lambda: print(text))


def print_text(text: str) -> None:
    """Print text that carries its own line ends."""
    _deliver(lambda: print(text, end=""))


def print_terminal(render: Callable[[Any, Console], None], record: object) -> None:
    """Print a record with one of the terminal renderers."""
    from optplan.reports.terminal.console import make_console

    _deliver(lambda: render(record, make_console(sys.stdout)))


def check_targets(*paths: str | None) -> None:
    """Refuse early the files that could not be written in the end.

    Raises:
        OptplanError: A folder is missing or may not be written.
    """
    from optplan.planner.measured.record_files import check_target

    for path in paths:
        if path is not None:
            check_target(path)


def write_page(path: str | None, make: Callable[[], str]) -> None:
    """Write a document where a file is asked for, and say so on stderr.

    Raises:
        OptplanError: It cannot be written; what was there before still is.
    """
    if path is None:
        return
    from pathlib import Path

    from optplan.planner.errors import printable
    from optplan.planner.measured.record_files import write_atomically

    write_atomically(Path(path), make().encode())
    print(f"wrote {printable(path)}", file=sys.stderr)


def import_torch_part(name: str) -> Any:
    """Import a part of optplan that needs torch.

    Raises:
        ConfigError: torch is not installed.
    """
    from importlib import import_module
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise ConfigError("this needs torch, which is not installed: pip install 'optplan[gpu,hf]'")
    import_module("torch")
    _quieten()  # after torch, which sets the levels of its loggers
    return import_module(name)


def _quieten() -> None:
    """Leave stderr to our own words: what other packages deprecate is nothing that a user here can change."""
    import logging
    import warnings

    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    for package in ("torch", "torchao", "transformers"):
        logging.getLogger(package).setLevel(logging.ERROR)


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Show on stderr what is being done, where that is a terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console

    console = Console(stderr=True)
    # Drawn seldom: what is measured meanwhile shares the interpreter with whatever draws.
    with console.status("starting", spinner="line", refresh_per_second=2) as status:
        yield status.update


def _deliver(write: Callable[[], None]) -> None:
    """Write to stdout; a reader that has seen enough and closed the pipe changes nothing about the exit status."""
    if sys.stdout is None:
        raise ConfigError("stdout is closed: there is nowhere to print the result")
    try:
        write()
        sys.stdout.flush()
    except BrokenPipeError:
        # What Python would flush at exit must not fail a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
