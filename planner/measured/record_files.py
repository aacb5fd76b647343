"""Records on disk: written whole or not at all, read back strictly."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from optplan.planner.errors import ConfigError, OptplanError, shorten
from optplan.planner.measured.measurement import Measurement
from optplan.planner.records import EstimateReport

Record = EstimateReport | Measurement

_TYPES: dict[str, type[EstimateReport] | type[Measurement]] = {
    "optplan.estimate/1": EstimateReport,
    "optplan.measurement/1": Measurement,
}
_LARGEST_BYTES = 2**30
"""More than this, unpacked, no record holds; a file that unpacks to more was made to exhaust the memory."""
_GZIP_MAGIC = b"\x1f\x8b"


def save_record(record: Record, path: str | Path) -> Path:
    """Write a record as compressed JSON; the file is either there in full or as it was before.

    Returns:
        The path written.

    Raises:
        OptplanError: The folder does not exist, may not be written or is full.
    """
    target = Path(path)
    text = json.dumps(msgspec.to_builtins(record), separators=(",", ":")).encode()
    # Without a time of its own, equal records are equal files.
    write_atomically(target, gzip.compress(text, mtime=0))
    return target


def check_target(path: str | Path) -> None:
    """Refuse early a file that could not be written after a long measurement.

    Raises:
        OptplanError: Its folder is missing or may not be written, or it is a folder itself.
    """
    target = Path(path)
    if target.is_dir():
        raise OptplanError(f"cannot write {shorten(str(path))}: it is a folder; nothing was saved")
    try:
        with _beside(target):
            pass
    except OSError as error:
        raise OptplanError(f"cannot write {shorten(str(path))}: {error.strerror or error}; nothing was saved") from None


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is never seen half-written.

    Raises:
        OptplanError: It cannot be written; what was there before still is.
    """
    try:
        with _beside(path) as (stream, name):
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
            Path(name).replace(path)
    except OSError as error:
        raise OptplanError(f"cannot write {shorten(str(path))}: {error.strerror or error}; nothing was saved") from None


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[tuple[BinaryIO, str]]:
    """A new file in the folder of `path`, removed unless it was moved."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:60]}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream, name
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()


def load_record(path: str | Path) -> Record:
    """Read a record that optplan saved or that `--json` printed, compressed or not.

    Raises:
        ConfigError: The file is missing, cut short, no record of optplan, or of a newer version.
    """
    shown = shorten(str(path))
    content = _read(Path(path), shown)
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        raise ConfigError(f"{shown} is not a record: it is no JSON document, or was cut short") from None
    schema = fields.get("schema") if isinstance(fields, dict) else None
    if not isinstance(schema, str) or schema not in _TYPES:
        raise _unknown_schema(shown, schema)
    try:
        return msgspec.convert(fields, _TYPES[schema])
    except msgspec.ValidationError as error:
        raise ConfigError(f"{shown} is a damaged {schema} record: {error}") from None


def _read(path: Path, shown: str) -> bytes:
    try:
        with path.open("rb") as stream:
            content = stream.read(_LARGEST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot read {shown}: {reason}") from None
    if content.startswith(_GZIP_MAGIC):
        content = _unpack(content, shown)
    if len(content) > _LARGEST_BYTES:
        raise ConfigError(f"{shown} holds more than 1 GiB; allowed: records, which are smaller")
    return content


def _unpack(content: bytes, shown: str) -> bytes:
    unpacker = zlib.decompressobj(wbits=31)
    try:
        text = unpacker.decompress(content, _LARGEST_BYTES + 1)
    except zlib.error:
        raise ConfigError(f"{shown} is damaged: its compressed content cannot be unpacked") from None
    if not unpacker.eof and len(text) <= _LARGEST_BYTES:
        raise ConfigError(f"{shown} was cut short: its compressed content has no end")
    return text


def _unknown_schema(shown: str, schema: object) -> ConfigError:
    known = ", ".join(_TYPES)
    if not isinstance(schema, str):
        return ConfigError(f"{shown} is not a record of optplan: it names no schema; known: {known}")
    family, _, version = schema.rpartition("/")
    if any(name.rpartition("/")[0] == family for name in _TYPES) and version.isascii() and version.isdigit():
        return ConfigError(f"{shown} was made by a newer optplan: schema {shorten(schema)}; this version reads {known}")
    return ConfigError(f"{shown} has schema {shorten(schema)}, which cannot be read here; known: {known}")
