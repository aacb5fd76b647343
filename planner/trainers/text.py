"""Documents in YAML, TOML and JSON, with what must be done by hand at their head where comments exist."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from optplan.planner.version import VERSION

_WIDTH = 96


def yaml_text(fields: Mapping[str, Any], *, by_hand: Sequence[str] = ()) -> str:
    """Fields as a YAML document that every YAML reader takes in the same way."""
    import yaml

    body: str = yaml.safe_dump(dict(fields), sort_keys=False, default_flow_style=False, width=_WIDTH)
    return head(by_hand) + body


def json_text(fields: Mapping[str, Any]) -> str:
    """Fields as a JSON document, which has no comments."""
    return json.dumps(fields, indent=2) + "\n"


def toml_text(tables: Mapping[str, Mapping[str, Any]], *, by_hand: Sequence[str] = ()) -> str:
    """Tables of plain values as a TOML document."""
    parts = [
        "\n".join([f"[{name}]", *(f"{key} = {_toml_value(value)}" for key, value in fields.items())])
        for name, fields in tables.items()
    ]
    return head(by_hand) + "\n\n".join(parts) + "\n"


def head(by_hand: Sequence[str], *, comment: str = "# ") -> str:
    """The comment at the top of a file: who wrote it, and what it cannot say."""
    lines = [f"Written by optplan {VERSION}."]
    lines += ["To be done by hand:"] if by_hand else []
    for sentence in by_hand:
        lines += textwrap.wrap(sentence, _WIDTH, initial_indent="- ", subsequent_indent="  ", break_long_words=False)
    return "".join(f"{comment}{line}".rstrip() + "\n" for line in lines) + "\n"


def _toml_value(value: Any) -> str:
    # JSON's strings, numbers, lists and booleans are TOML's.
    return json.dumps(value)
