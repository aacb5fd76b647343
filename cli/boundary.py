"""The one place where an exception becomes a sentence on stderr and an exit status."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any, TextIO

import typer

from optplan.planner.errors import ConfigError, OptplanError

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

# Typer carries its own command-line parser and exports only this one of its errors; the base classes are reached by it.
_UsageError: Any = typer.BadParameter.__mro__[1]
_ParserError: Any = typer.BadParameter.__mro__[2]


def run(app: typer.Typer, args: list[str] | None = None) -> int:
    """Run the application and return its exit status; nothing but the status leaves this function."""
    make_printable(sys.stdout)
    make_printable(sys.stderr)
    try:
        status = app(args=args, prog_name="optplan", standalone_mode=False)
    except (SystemExit, typer.Exit) as stop:
        status = stop.code if isinstance(stop, SystemExit) else stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except Exception as error:
        return _complain(*_explain(error))
    if status == INTERRUPTED:
        return _complain("interrupted", INTERRUPTED)
    return status if isinstance(status, int) else DONE


def make_printable(stream: TextIO | None) -> None:
    """Let the stream replace what its encoding cannot express, so that a locale never ends a command."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")


def _explain(error: Exception) -> tuple[str, int]:
    if isinstance(error, OptplanError):
        return str(error), BAD_INPUT if isinstance(error, ConfigError) else FAILED
    if isinstance(error, _UsageError | _ParserError):
        return _one_line(error.format_message()), BAD_INPUT
    if isinstance(error, OSError):
        return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", FAILED
    if os.environ.get("OPTPLAN_DEBUG"):
        raise error
    return f"internal error, please report it: {type(error).__name__}: {error} (OPTPLAN_DEBUG=1 shows where)", FAILED


def _one_line(message: str) -> str:
    text = " ".join(message.split()).rstrip(".")
    return text[:1].lower() + text[1:]


def _complain(sentence: str, status: int) -> int:
    with contextlib.suppress(BrokenPipeError):
        print(f"optplan: {sentence}", file=sys.stderr)
    return status
