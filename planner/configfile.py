"""Reading a `config.json` from anywhere: whatever the file holds, the answer is an object or one sentence.

Time and memory are bounded by the size limit, which is checked before a byte is read.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, NoReturn

from optplan.planner.errors import ConfigError, shorten

MAX_BYTES = 2**20
"""Largest file read; published configurations are a few kilobytes."""
MAX_DEPTH = 32
MAX_DIGITS = 100

_PATH_LIMIT = 200
_STRUCTURE = re.compile(r'\\.|["\[\]{}]', re.DOTALL)


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file, with unique keys and finite numbers.

    Raises:
        ConfigError: There is no such file, it cannot be read, is not a regular file, is over 1 MiB, is not UTF-8 JSON,
            is nested over 32 deep, repeats a key, holds NaN, an infinity or an endless integer, or is no object.
    """
    where = shorten(os.fspath(path), limit=_PATH_LIMIT)
    return parse_config(_text(_read_bytes(path, where), where), where=where)


def parse_config(text: str, *, where: str) -> dict[str, Any]:
    """The object in JSON text; `where` names its origin in errors.

    Raises:
        ConfigError: As for `read_config`, apart from the file itself.
    """
    if _too_deep(text):
        raise ConfigError(f"{where} is nested more than {MAX_DEPTH} deep, which no configuration is")
    strict = _Strict(where)
    try:
        value = json.loads(
            text,
            object_pairs_hook=strict.object,
            parse_constant=strict.constant,
            parse_int=strict.integer,
            parse_float=strict.real,
        )
    except json.JSONDecodeError as error:
        complaint = error.msg.removesuffix(" starting at")
        raise ConfigError(f"{where} is not JSON: {complaint} at line {error.lineno} column {error.colno}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must hold one JSON object, got {shorten(value)}")
    return value


def _read_bytes(path: str | os.PathLike[str], where: str) -> bytes:
    """At most `MAX_BYTES` of a regular file; anything else is refused unread."""
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            _refuse_irregular(path, where)
        # Should the path be swapped for a pipe in between, opening must not wait for a writer.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                _refuse_irregular(path, where)
            if status.st_size > MAX_BYTES:
                raise ConfigError(f"{where} has {status.st_size} bytes; a config.json has at most {MAX_BYTES}")
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"there is no file {where}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a valid path"
        raise ConfigError(f"{where} cannot be read: {reason}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{where} has more than {MAX_BYTES} bytes; a config.json has at most {MAX_BYTES}")
    return data


def _refuse_irregular(path: str | os.PathLike[str], where: str) -> NoReturn:
    if Path(path).is_dir():
        raise ConfigError(f"{where} is a folder; give the config.json in it")
    raise ConfigError(f"{where} is not a regular file")


def _text(data: bytes, where: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ConfigError(f"{where} is not UTF-8 text; give the model's config.json, not its weights")
    return text


def _too_deep(text: str) -> bool:
    """Whether brackets outside strings open more than `MAX_DEPTH` levels; stops at the first that does."""
    depth, in_string = 0, False
    for match in _STRUCTURE.finditer(text):
        token = match.group()
        if token == '"':
            in_string = not in_string
        elif in_string or len(token) > 1:
            continue
        elif token in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                return True
        else:
            depth -= 1
    return False


class _Strict:
    """The hooks that make `json` refuse what it would let through."""

    def __init__(self, where: str) -> None:
        self.where = where

    def object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for key, value in pairs:
            if key in fields:
                raise ConfigError(f"{self.where} holds the field {shorten(key)} twice")
            fields[key] = value
        return fields

    def constant(self, name: str) -> NoReturn:
        raise ConfigError(f"{self.where} holds {name}, which is not a JSON number")

    def integer(self, digits: str) -> int:
        length = len(digits.removeprefix("-"))
        if length > MAX_DIGITS:
            raise ConfigError(f"{self.where} holds an integer of {length} digits; at most {MAX_DIGITS} are read")
        return int(digits)

    def real(self, digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ConfigError(f"{self.where} holds the number {shorten(digits)}, which is beyond a 64-bit float")
        return value
