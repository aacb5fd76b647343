"""Markdown's tables, with nothing from a record taken for markup."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from optplan.planner.errors import printable

_MARKUP = re.compile(r"([\\`*_\[\]<>#|~&@])")


def escaped(text: str) -> str:
    """Text from outside as Markdown shows it letter for letter."""
    return _MARKUP.sub(r"\\\1", printable(text))


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], *, num_texts: int = 1) -> list[str]:
    """Lines of a table; cells are Markdown already, the first `num_texts` columns stand left."""
    marks = ["---" if index < num_texts else "---:" for index in range(len(titles))]
    return [_line(titles), _line(marks), *map(_line, rows)]


def code(text: str) -> list[str]:
    """Lines of a block of code, fenced by more backquotes than it holds."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return [f"{fence}console", printable(text), fence]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
