"""What a page is made of: sections of figures, tables, facts and commands, each with the source of its numbers."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from optplan.reports.html.figures.plot import Figure

Kind = Literal[
    "text", "code", "bytes", "signed_bytes", "int", "percent", "signed_percent", "error", "duration", "milliseconds",
    "decimal", "number",
]  # fmt: skip
"""How a column's values are shown; bytes are shown as GiB and kept exact in CSV, an error is a share without a sign."""

Value = str | int | float | bool | None


class Column(msgspec.Struct, frozen=True):
    """A column of a table: its title, and how its values are shown."""

    title: str
    kind: Kind = "text"


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """A table that can be copied and saved as CSV.

    Attributes:
        id: Unique within the page.
        caption: What it shows, in words.
        columns: Its columns; the first names the row.
        rows: Raw values, one a column.
        source: Where the numbers come from.
        tones: One a row: `good`, `bad` or empty.
        folded: Whether it is shown only when asked for.
    """

    id: str
    caption: str
    columns: list[Column]
    rows: list[list[Value]]
    source: str
    tones: list[str] = []
    folded: bool = False
    kind: Literal["table"] = "table"


class Drawing(msgspec.Struct, frozen=True, kw_only=True):
    """A figure with its data as a table.

    Attributes:
        id: Unique within the page.
        title: What it shows.
        summary: What can be read from it, for those who do not see it.
        figure: The figure.
        table: Its data.
    """

    id: str
    title: str
    summary: str
    figure: Figure
    table: Table
    kind: Literal["drawing"] = "drawing"


class Fact(msgspec.Struct, frozen=True):
    """One number to be seen first.

    Attributes:
        label: What it is.
        value: The number, None if it is not known.
        source: Where it comes from, in a word or two.
        kind: How it is shown.
        tone: `good`, `bad` or empty.
    """

    label: str
    value: Value
    source: str
    kind: Kind = "bytes"
    tone: str = ""


class Facts(msgspec.Struct, frozen=True):
    """Numbers beside each other."""

    facts: list[Fact]
    kind: Literal["facts"] = "facts"


class Code(msgspec.Struct, frozen=True):
    """Text to copy: a command, a few lines of Python."""

    id: str
    title: str
    text: str
    kind: Literal["code"] = "code"


class Exported(msgspec.Struct, frozen=True):
    """A configuration as the file of a training program.

    Attributes:
        id: Unique within the page.
        title: The program.
        file_name: What the file is called.
        text: The file.
        command: How to start it.
        by_hand: What the program cannot be told in the file.
    """

    id: str
    title: str
    file_name: str
    text: str
    command: str
    by_hand: list[str]


class Refused(msgspec.Struct, frozen=True):
    """A training program, or several, that cannot run the configuration, and why."""

    title: str
    reason: str


class Exports(msgspec.Struct, frozen=True):
    """The configuration for training programs."""

    written: list[Exported]
    refused: list[Refused]
    kind: Literal["exports"] = "exports"


class Points(msgspec.Struct, frozen=True):
    """Sentences, one below the other."""

    sentences: list[str]
    kind: Literal["points"] = "points"


class Download(msgspec.Struct, frozen=True):
    """The page's record as a file."""

    file_name: str
    kind: Literal["download"] = "download"


class Switches(msgspec.Struct, frozen=True):
    """The controls of the grid of answers.

    Attributes:
        axes: Name, label and values of each control.
        start: The value that each begins with.
        figure: The bar of one answer, its traces named as the categories.
        table: All answers.
        source: Where the numbers come from.
    """

    axes: list[tuple[str, str, list[str]]]
    start: dict[str, str]
    figure: Figure
    table: Table
    source: str
    kind: Literal["switches"] = "switches"


Part = Drawing | Table | Facts | Code | Exports | Points | Download | Switches


class Section(msgspec.Struct, frozen=True):
    """A part of the page with a heading."""

    id: str
    title: str
    lead: str
    parts: list[Part]


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """A whole page.

    Attributes:
        title: Title of the document.
        kicker: A line above the headline.
        headline: The answer.
        tone: `good`, `bad` or empty.
        lead: A sentence below it.
        sections: The sections in their order.
        records: What the page embeds, by name; every number on it is from these.
    """

    title: str
    kicker: str
    headline: str
    tone: str
    lead: str
    sections: list[Section]
    records: dict[str, Any]
