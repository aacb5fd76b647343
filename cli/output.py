"""Results to stdout: one JSON document, or text for the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def print_json(record: object) -> None:
    """Print a record as one indented JSON document, in ASCII so that no locale can spoil it."""
    import json

    import msgspec

    print(json.dumps(msgspec.to_builtins(record), indent=2))


def print_terminal(render: Callable[[Any, Console], None], record: object) -> None:
    """Print a record with one of the terminal renderers."""
    from optplan.reports.terminal.console import make_console

    render(record, make_console(sys.stdout))


def note(sentence: str) -> None:
    """Print a remark on stderr."""
    print(f"optplan: {sentence}", file=sys.stderr)
