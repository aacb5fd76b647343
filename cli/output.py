"""Results to stdout: one JSON document, or text for the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
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


def print_terminal(render: Callable[[Any, Console], None], record: object) -> None:
    """Print a record with one of the terminal renderers."""
    from optplan.reports.terminal.console import make_console

    _deliver(lambda: render(record, make_console(sys.stdout)))


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
