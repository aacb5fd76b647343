"""Job files as plain data: JSON, YAML or TOML, read without running or importing anything that they name."""

from __future__ import annotations

import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optplan.planner.configfile import parse_config
from optplan.planner.errors import ConfigError, shorten

MAX_BYTES = 2**20
"""Largest job file read; written ones are a few kilobytes."""
MAX_DEPTH = 32
MAX_FIELDS = 10_000

_SHOWN = 200
_SUFFIXES = (".yaml", ".yml", ".json", ".toml")


def read_document(path: str) -> dict[str, Any]:
    """The mapping in a job file.

    Raises:
        ConfigError: There is no such file, it cannot be read, is larger than 1 MiB, is not what its suffix says, is
            nested over 32 deep, has over 10,000 fields, or is no mapping.
    """
    where = shorten(path, limit=_SHOWN)
    suffix = Path(path).suffix.lower()
    if suffix not in _SUFFIXES:
        raise ConfigError(f"{where} is no job file: its name must end in {', '.join(_SUFFIXES)}")
    text = _text(path, where)
    document = _PARSERS[suffix](text, where)
    if not isinstance(document, dict):
        raise ConfigError(f"{where} must hold a mapping of fields, got {shorten(document)}")
    _check_shape(document, where)
    return document


def _text(path: str, where: str) -> str:
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{where} is not a regular file")
        if status.st_size > MAX_BYTES:
            raise ConfigError(f"{where} has {status.st_size} bytes; a job file has at most {MAX_BYTES}")
        with Path(path).open("rb") as stream:
            return stream.read(MAX_BYTES).decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"there is no file {where}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{where} is not UTF-8 text") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a valid path"
        raise ConfigError(f"{where} cannot be read: {reason}") from None


def _yaml(text: str, where: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" at line {mark.line + 1} column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error.problem).split())}{place}") from None
    except RecursionError:
        raise ConfigError(f"{where} is nested more than {MAX_DEPTH} deep, which no job is") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where} is not YAML: {shorten(' '.join(str(error).split()))}") from None


def _toml(text: str, where: str) -> Any:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{where} is nested more than {MAX_DEPTH} deep, which no job is") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where} is not TOML: {str(error)[:1].lower()}{str(error)[1:]}") from None


def _json(text: str, where: str) -> Any:
    return parse_config(text, where=where)


_PARSERS = {".yaml": _yaml, ".yml": _yaml, ".json": _json, ".toml": _toml}


def _check_shape(document: dict[str, Any], where: str) -> None:
    """Refuse what would take forever to walk: YAML's aliases can nest a document within itself."""
    for count, (depth, _) in enumerate(_walk(document, 1)):
        if depth > MAX_DEPTH:
            raise ConfigError(f"{where} is nested more than {MAX_DEPTH} deep, which no job is")
        if count >= MAX_FIELDS:
            raise ConfigError(f"{where} has more than {MAX_FIELDS} fields, which no job has")


def _walk(value: Any, depth: int) -> Iterator[tuple[int, Any]]:
    yield depth, value
    if depth > MAX_DEPTH:
        return
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        yield from _walk(child, depth + 1)
