"""Opening a snapshot file: pickle or JSON, compressed or not, into plain containers.

A pickle can hold instructions to call anything that Python can import. A snapshot consists of dictionaries, lists,
texts and numbers alone, so everything else in a pickle is refused before it is touched.
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
import stat
import zlib
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from optplan.planner.errors import ConfigError, shorten

MAX_BYTES = 2**31
"""Largest snapshot read, compressed or not."""

_GZIP = b"\x1f\x8b"
_PICKLE = b"\x80"
_ZIP = b"PK\x03\x04"
_PATH_LIMIT = 200


def read_snapshot(path: str | os.PathLike[str]) -> Any:
    """What a file written by `torch.cuda.memory._dump_snapshot`, or a JSON form of it, holds.

    Raises:
        ConfigError: There is no such file, it is no regular file, is too large, is truncated, is neither pickle nor
            JSON, or holds anything but plain containers, texts and numbers.
    """
    where = shorten(os.fspath(path), limit=_PATH_LIMIT)
    data = _read_bytes(Path(path), where)
    if data.startswith(_GZIP):
        data = _unzip(data, where)
    if not data.strip():
        raise ConfigError(f"{where} is empty; a snapshot is written by torch.cuda.memory._dump_snapshot")
    if data.startswith(_ZIP):
        raise ConfigError(f"{where} is a zip archive, such as torch.save writes; give the snapshot itself")
    return _unpickle(data, where) if data.startswith(_PICKLE) else _parse(data, where)


def _read_bytes(path: Path, where: str) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError(f"{where} is not a regular file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"there is no file {where}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a valid path"
        raise ConfigError(f"cannot read {where}: {reason}") from None
    return _within_limit(data, where)


def _within_limit(data: bytes, where: str) -> bytes:
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{where} holds more than {MAX_BYTES} bytes; record fewer entries (max_entries)")
    return data


def _unzip(data: bytes, where: str) -> bytes:
    try:
        with gzip.open(io.BytesIO(data)) as file:
            return _within_limit(file.read(MAX_BYTES + 1), where)
    except (OSError, EOFError, zlib.error):
        raise ConfigError(f"{where} is truncated or damaged: its compressed data does not end") from None


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, texts, numbers, True, False and None; refuses whatever else a pickle can name."""

    def __init__(self, data: bytes, where: str) -> None:
        super().__init__(io.BytesIO(data))
        self._where = where

    def find_class(self, module: str, name: str, /) -> NoReturn:
        raise ConfigError(
            f"{self._where} asks for {shorten(f'{module}.{name}')}, which no snapshot needs: nothing of it was run"
        )

    def persistent_load(self, pid: Any, /) -> NoReturn:
        raise ConfigError(f"{self._where} refers to {shorten(pid)} outside of the file, which no snapshot does")


def _unpickle(data: bytes, where: str) -> Any:
    try:
        return _PlainUnpickler(data, where).load()
    except ConfigError:
        raise
    except (EOFError, pickle.UnpicklingError) as error:
        if isinstance(error, EOFError) or "truncated" in str(error) or "exhausted" in str(error):
            raise ConfigError(f"{where} is truncated: the pickle does not end") from None
        raise ConfigError(f"{where} is not a pickle of plain data") from None
    except Exception:
        # A damaged pickle can fail in any way at all: wrong stack, wrong types, sizes beyond memory.
        raise ConfigError(f"{where} is not a pickle of plain data") from None


def _parse(data: bytes, where: str) -> Any:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if "truncated" in str(error):
            raise ConfigError(f"{where} is truncated: the JSON text does not end") from None
        raise ConfigError(
            f"{where} is neither a pickle nor JSON; give a file of torch.cuda.memory._dump_snapshot"
        ) from None
