"""The jobs of `measure_all.py`: what they run, what they need, and whether they are through."""

from __future__ import annotations

import json
import shutil
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

COMMIT_VARIABLE = "OPTPLAN_COMMIT"
NOTE_VARIABLE = "OPTPLAN_RECORD_NOTE"
"""Read by everything that makes records: the commit of the code, and what must be said of the circumstances."""
BUSY_HOST = "measured while other GPUs of this host were busy: the host's share of the times may be longer"


class Job(NamedTuple):
    """One command.

    Attributes:
        name: What tells it from the others; its log and its mark are named after it.
        command: Words of the command. `python` is this interpreter, `{out}` the folder that it writes to, `{commit}`
            the commit.
        gpus: How many it takes: 0, 1, or all that a pair has.
        seconds: How long it takes, about.
        goes_on: Whether it goes on where it was stopped; the others begin anew.
    """

    name: str
    command: tuple[str, ...]
    gpus: int
    seconds: float
    goes_on: bool = False


class Result(NamedTuple):
    """How a job ended.

    Attributes:
        name: Of the job.
        status: `done`, `failed` or `stopped`; `left` was not begun.
        seconds: How long it ran.
        gpus: Numbers of the GPUs that it had.
        begin: Seconds after the beginning of the run.
        last: The last line of its log.
    """

    name: str
    status: str
    seconds: float = 0.0
    gpus: tuple[int, ...] = ()
    begin: float = 0.0
    last: str = ""


def read_jobs(path: Path, only: Sequence[str] | None) -> list[Job]:
    """The jobs of a file in its order, all or those named.

    Raises:
        SystemExit: A name is not there, or a job has a field that is not known.
    """
    with path.open("rb") as file:
        rows: list[dict[str, Any]] = tomllib.load(file)["job"]
    unknown_fields = {key for row in rows for key in row} - set(Job._fields)
    if unknown_fields:
        raise SystemExit(f"{path.name}: unknown field {', '.join(sorted(unknown_fields))}")
    jobs = [Job(**{**row, "command": tuple(row["command"].split())}) for row in rows]
    missing = set(only or ()) - {job.name for job in jobs}
    if missing:
        raise SystemExit(f"no job {', '.join(sorted(missing))}; known: {', '.join(job.name for job in jobs)}")
    return [job for job in jobs if not only or job.name in only]


class Store:
    """The folder in which jobs leave what they found; it outlives a call."""

    def __init__(self, folder: Path, commit: str) -> None:
        self.folder, self.commit = folder, commit
        for name in ("done", "logs", "work"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def is_done(self, job: Job) -> bool:
        """Whether the same command was through at the same commit."""
        mark = self._mark(job)
        return mark.exists() and json.loads(mark.read_text())["key"] == self._key(job)

    def prepare(self, job: Job) -> Path:
        """The job's own folder, empty unless it goes on where it was stopped."""
        work = self.work_of(job)
        if not job.goes_on:
            shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        return work

    def words(self, job: Job) -> list[str]:
        """Its command with everything filled in."""
        filled = {"{out}": str(self.work_of(job)), "{commit}": self.commit}
        words = list(job.command)
        for mark, value in filled.items():
            words = [word.replace(mark, value) for word in words]
        return [sys.executable, *words[1:]] if words[0] == "python" else words

    def finish(self, job: Job, result: Result) -> None:
        """Mark the job as through."""
        mark = self._mark(job)
        begun = mark.with_suffix(".part")
        begun.write_text(json.dumps({"key": self._key(job), **result._asdict()}))
        begun.replace(mark)

    def log_of(self, job: Job) -> Path:
        """The file that has all it printed."""
        return self.folder / "logs" / f"{job.name}.log"

    def work_of(self, job: Job) -> Path:
        """The job's own folder."""
        return self.folder / "work" / job.name

    def result_of(self, job: Job) -> Mapping[str, Any]:
        """What was noted when it was through."""
        found: dict[str, Any] = json.loads(self._mark(job).read_text())
        return found

    def _mark(self, job: Job) -> Path:
        return self.folder / "done" / f"{job.name}.json"

    def _key(self, job: Job) -> list[str]:
        return [self.commit, *job.command]


def last_line(path: Path) -> str:
    """The last line of a log that says something."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def keep_whole_lines(folder: Path) -> None:
    """Take away what a stopped job has written of a last line, and files that were never finished."""
    for path in folder.rglob("*.jsonl"):
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            path.write_bytes(whole)
    for path in folder.rglob(".*"):
        if path.is_file():
            path.unlink()
