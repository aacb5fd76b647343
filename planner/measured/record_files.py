"""Records on disk: written whole or not at all, read back strictly."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import tempfile
import zlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import BinaryIO

import msgspec

from optplan.planner.errors import ConfigError, OptplanError, shorten
from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.step_times import SCHEMA as STEP_TIMES_SCHEMA
from optplan.planner.records import EstimateReport

Record = EstimateReport | Measurement

STEPS = ("optplan.estimate/1", "optplan.measurement/1")
"""Schemas of the records of training steps, which can be compared."""
ANSWERS = {
    "optplan.estimate/1": "optplan.planner.records:EstimateReport",
    "optplan.measurement/1": "optplan.planner.measured.measurement:Measurement",
    "optplan.recommend/1": "optplan.planner.search.records:SearchReport",
    "optplan.sweep/1": "optplan.planner.sweep_records:SweepReport",
    "optplan.timeline/1": "optplan.planner.timeline_report:TimelineReport",
    "optplan.explain/1": "optplan.planner.explanation:Explanation",
    "optplan.compare/1": "optplan.planner.measured.comparison:Comparison",
    "optplan.validation/1": "optplan.planner.measured.validation:ValidationReport",
    "optplan.replay/1": "optplan.planner.history.report:HistoryReport",
    "optplan.models/1": "optplan.planner.listings:ModelListing",
    "optplan.gpus/1": "optplan.planner.listings:GpuListing",
    "optplan.optimizers/1": "optplan.planner.listings:OptimizerListing",
    "optplan.published/1": "optplan.planner.published:PublishedReport",
}
"""The type of everything that a command prints with `--json`, by schema."""
_LARGEST_BYTES = 2**30
"""More than this, unpacked, no record holds; a file that unpacks to more was made to exhaust the memory."""
_LONGEST_LAUNCH_SECONDS = 1.0
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
        ConfigError: Its folder is missing or may not be written, or it is a folder itself.
    """
    target = Path(path)
    if target.is_dir():
        raise ConfigError(f"cannot write {shorten(str(path))}: it is a folder; nothing was saved")
    try:
        with _beside(target):
            pass
    except OSError as error:
        raise ConfigError(f"cannot write {shorten(str(path))}: {error.strerror or error}; nothing was saved") from None


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
    """Read a step's record that optplan saved or that `--json` printed, compressed or not.

    Raises:
        ConfigError: The file is missing, cut short, no record of a step, or of a newer version.
    """
    answer = load_answer(path)
    if isinstance(answer, EstimateReport | Measurement):
        return answer
    schema: str = getattr(answer, "schema", "")
    raise ConfigError(
        f"{shorten(str(path))} has schema {schema!r}, which is no record of a step and is read by show alone; "
        f"allowed: {', '.join(STEPS)}"
    )


def load_answer(path: str | Path) -> msgspec.Struct:
    """Read anything that a command of optplan saved or printed with `--json`, compressed or not.

    Raises:
        ConfigError: The file is missing, cut short, nothing of optplan's, or of a newer version.
    """
    shown = shorten(str(path))
    content = _read(Path(path), shown)
    try:
        fields = json.loads(content, parse_constant=_no_number)
    except (ValueError, RecursionError):
        if STEP_TIMES_SCHEMA.encode() in content.partition(b"\n")[0]:
            raise _step_times(shown) from None
        raise ConfigError(f"{shown} is not a record: it is no JSON document, or was cut short") from None
    schema = fields.get("schema") if isinstance(fields, dict) else None
    if not isinstance(schema, str) or schema not in ANSWERS:
        raise _unknown_schema(shown, schema)
    module, _, name = ANSWERS[schema].partition(":")
    try:
        answer: msgspec.Struct = msgspec.convert(fields, getattr(import_module(module), name))
    except msgspec.ValidationError as error:
        raise ConfigError(f"{shown} is a damaged {schema} record: {error}") from None
    return _with_possible_host(_with_possible_times(answer)) if isinstance(answer, Measurement) else answer


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _with_possible_host(record: Measurement) -> Measurement:
    """The record without a time of its host's launches that cannot be one."""
    seconds = record.time.host_launch_seconds if record.time else None
    if record.time is None or seconds is None or 0 < seconds < _LONGEST_LAUNCH_SECONDS:
        return record
    note = f"how fast the host launched is not measured: {seconds:g} seconds cannot be the time of one operation"
    time = msgspec.structs.replace(record.time, host_launch_seconds=None)
    return msgspec.structs.replace(record, time=time, notes=[*record.notes, note])


def _with_possible_times(record: Measurement) -> Measurement:
    """The record without times that no clock can have shown; early versions read two of their moments swapped."""
    time = record.time
    if time is None:
        return record
    whole = time.step_seconds
    wrong = [] if whole is None or whole > 0 else ["the whole step"]
    wrong += [phase for phase, seconds in time.phases.items() if seconds < 0]
    if not wrong:
        return record
    sound = msgspec.structs.replace(
        time,
        step_seconds=None if "the whole step" in wrong else whole,
        tokens_per_second=None if "the whole step" in wrong else time.tokens_per_second,
        phases={phase: seconds for phase, seconds in time.phases.items() if phase not in wrong},
    )
    note = f"the time of {', '.join(wrong)} is not measured: by the record's own clock it ends before it begins"
    return msgspec.structs.replace(record, time=sound, notes=[*record.notes, note])


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


def _step_times(shown: str) -> ConfigError:
    return ConfigError(
        f"{shown} is no record but times of recorded steps in further processes, a line each; "
        "`optplan validate --check --records` on their folder judges the records by them"
    )


def _unknown_schema(shown: str, schema: object) -> ConfigError:
    known = ", ".join(STEPS)
    if not isinstance(schema, str):
        return ConfigError(f"{shown} is not a record of optplan: it names no schema; known: {known}")
    if schema == STEP_TIMES_SCHEMA:
        return _step_times(shown)
    family, _, version = schema.rpartition("/")
    ours = next((name for name in ANSWERS if name.rpartition("/")[0] == family), None)
    if ours is not None and version.isascii() and version.isdigit():
        reads = known if ours in STEPS else ours
        return ConfigError(f"{shown} was made by a newer optplan: schema {shorten(schema)}; this version reads {reads}")
    return ConfigError(f"{shown} has schema {shorten(schema)}, which cannot be read here; known: {known}")
