"""The console that every terminal report is drawn on, and the glyphs its encoding can show."""

from __future__ import annotations

from typing import TextIO

import msgspec
from rich.box import ASCII, SIMPLE_HEAD, Box
from rich.console import Console

MIN_WIDTH = 40
PIPE_WIDTH = 110
"""Columns used when stdout is not a terminal and COLUMNS does not say otherwise."""


class Glyphs(msgspec.Struct, frozen=True):
    """The signs a report draws with."""

    fills: str
    limit: str
    times: str
    dot: str
    bullet: str
    box: Box


UNICODE = Glyphs(fills="█▓▒░▚▞▤▥▧", limit="┃", times="×", dot="·", bullet="•", box=SIMPLE_HEAD)
PLAIN = Glyphs(fills="#=+-o~:%&", limit="|", times="x", dot="-", bullet="*", box=ASCII)


def make_console(stream: TextIO) -> Console:
    """A console on `stream`: colours only on a terminal and without NO_COLOR, as wide as the terminal."""
    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in console._environ:
        console.width = PIPE_WIDTH
    console.width = max(MIN_WIDTH, console.width)
    return console


def glyphs_of(console: Console) -> Glyphs:
    """The signs that the console's encoding can show."""
    try:
        UNICODE.fills.encode(console.encoding)
        (UNICODE.limit + UNICODE.times + UNICODE.dot + UNICODE.bullet + "─").encode(console.encoding)
    except (UnicodeEncodeError, LookupError):
        return PLAIN
    return UNICODE
