"""The console that every terminal report is drawn on, and the glyphs its encoding can show."""

from __future__ import annotations

from typing import TextIO

import msgspec
from rich.box import SIMPLE_HEAD, Box
from rich.console import Console

MIN_WIDTH = 40
PIPE_WIDTH = 128
"""Columns used when stdout is not a terminal and COLUMNS does not say otherwise."""


class Glyphs(msgspec.Struct, frozen=True):
    """The signs a report draws with."""

    fills: str
    limit: str
    times: str
    dot: str
    bullet: str
    box: Box


# rich's own plain box has bars between columns and so another width than the one above.
_PLAIN_BOX = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
UNICODE = Glyphs(fills="█▓▒░▚▞▤▥▧?", limit="┃", times="×", dot="·", bullet="•", box=SIMPLE_HEAD)
PLAIN = Glyphs(fills="#=+-o~:%&?", limit="|", times="x", dot="-", bullet="*", box=_PLAIN_BOX)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave a closed pipe to the caller; rich itself would end the process with status 1."""
        raise BrokenPipeError


def make_console(stream: TextIO) -> Console:
    """A console on `stream`: colours only on a terminal and without NO_COLOR, as wide as the terminal.

    Raises:
        BrokenPipeError: On printing, once the reader has closed the pipe.
    """
    console = _Console(file=stream, highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in console._environ:
        console.width = PIPE_WIDTH
    console.width = max(MIN_WIDTH, console.width)
    return console


def glyphs_of(console: Console) -> Glyphs:
    """The signs that the console's encoding can show; where there is colour, it tells the parts of a bar apart."""
    try:
        UNICODE.fills.encode(console.encoding)
        (UNICODE.limit + UNICODE.times + UNICODE.dot + UNICODE.bullet + "─").encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return PLAIN
    has_colour = console.color_system is not None and not console.no_color
    return msgspec.structs.replace(UNICODE, fills="█" * len(UNICODE.fills)) if has_colour else UNICODE
