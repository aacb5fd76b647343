"""Run every measurement of `measure_all.toml` on this machine's GPUs within a time budget, and pack what they found.

    python benchmarks/measure_all.py --out DIR --commit HASH --budget-seconds N [--pack DIR] [--only NAME ...]
    python benchmarks/measure_all.py --out DIR --dry-run [--gpus 2]

Jobs begin in the order of the file: those that take all GPUs alone, those that take one side by side, a GPU each. None
is begun that would not end in time unless it can go on later; at the end of the budget what runs is interrupted. The
same command goes on where the last one ended: what is done at the same commit is not done again. Everything is kept
under `--out`: a folder and a log for each job, and `run.jsonl` with the times and GPUs of every attempt. With `--pack`
all of it is put into as few archives as there are needed of at most 15 MiB each.

A stopped job leaves whole lines only. Jobs that have a GPU to themselves but not the host say so in their records.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from measure_jobs import (
    BUSY_HOST,
    COMMIT_VARIABLE,
    NOTE_VARIABLE,
    Job,
    Result,
    Store,
    keep_whole_lines,
    last_line,
    read_jobs,
)

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.1
GRACE_SECONDS = 25.0
"""Of the budget, kept for jobs that have to be stopped and for packing."""
LEAST_SECONDS = 20.0
"""A job that can go on later is not begun for less."""
LIMIT_FACTOR = 3.0
"""A job that takes so many times as long as it should is stopped."""
ARCHIVE_BYTES = 15 * 2**20


def main() -> int:
    """Run what is not done; 1 if a job failed."""
    options = parse_arguments()
    # A shell that starts this in the background has it ignore interrupts, and so would the jobs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    jobs = read_jobs(options.jobs, options.only)
    gpus = count_gpus() if options.gpus is None else options.gpus
    if options.dry_run:
        print_plan(jobs, gpus)
        return 0
    store = Store(options.out.resolve(), options.commit)
    run = Run(jobs, store, gpus, options.budget_seconds, options.pythonpath)
    try:
        results = run.run()
    finally:
        if options.pack is not None:
            pack(store.folder, options.pack)
    print_table(jobs, results, store)
    return int(any(result.status == "failed" for result in results))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that outlives the call")
    parser.add_argument("--commit", default="", help="commit to record")
    parser.add_argument("--budget-seconds", type=float, default=540.0, help="all is over after so long")
    parser.add_argument("--only", nargs="+", help="these jobs alone")
    parser.add_argument("--pack", type=Path, help="folder for the archives of what was found")
    parser.add_argument("--gpus", type=int, help="GPUs to use; all that nvidia-smi lists when left out")
    parser.add_argument("--pythonpath", default="", help="further folders in which jobs find packages")
    parser.add_argument("--jobs", type=Path, default=Path(__file__).with_suffix(".toml"), help="another list of jobs")
    parser.add_argument("--dry-run", action="store_true", help="say when each job would begin, and run nothing")
    return parser.parse_args()


def count_gpus() -> int:
    """The GPUs that the driver lists; 0 without a driver."""
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return found.stdout.count("UUID: GPU")


class Running(NamedTuple):
    """A job that runs."""

    job: Job
    process: subprocess.Popen[bytes]
    gpus: tuple[int, ...]
    begin: float


class Run:
    """One call: jobs begun as GPUs become free, until the budget is spent."""

    def __init__(self, jobs: Sequence[Job], store: Store, num_gpus: int, budget: float, pythonpath: str) -> None:
        self._waiting = [job for job in jobs if not store.is_done(job)]
        self._store, self._free, self._num_gpus = store, list(range(num_gpus)), num_gpus
        self._budget, self._pythonpath = budget - min(GRACE_SECONDS, budget / 2), python_path(pythonpath)
        self._running: list[Running] = []
        self._results: list[Result] = []
        self._origin = time.monotonic()

    def run(self) -> list[Result]:
        """Everything that fits into the budget."""
        try:
            while self._running or self._waiting:
                self._begin_what_fits()
                if not self._running:
                    break
                time.sleep(POLL_SECONDS)
                self._look_after()
        finally:
            self._stop(list(self._running))
        return [*self._results, *(Result(job.name, "left") for job in self._waiting)]

    def _left(self) -> float:
        return self._budget - (time.monotonic() - self._origin)

    def _begin_what_fits(self) -> None:
        """Begin jobs in their order; one that needs more GPUs than are free keeps those behind it waiting."""
        for job in list(self._waiting):
            enough = LEAST_SECONDS if job.goes_on else job.seconds
            if job.gpus > self._num_gpus or self._left() < min(enough, job.seconds):
                continue
            if job.gpus > len(self._free):
                return
            self._waiting.remove(job)
            self._begin(job)

    def _begin(self, job: Job) -> None:
        gpus = tuple(self._free[: job.gpus])
        del self._free[: job.gpus]
        self._store.prepare(job)
        variables = {**os.environ, "PYTHONPATH": self._pythonpath, "PYTHONUNBUFFERED": "1"}
        # Where Python keeps no bytecode, every process compiles torch and transformers anew, for eight seconds.
        if variables.pop("PYTHONDONTWRITEBYTECODE", None):
            variables.setdefault("PYTHONPYCACHEPREFIX", str(Path(tempfile.gettempdir(), "optplan-bytecode")))
        if self._store.commit:
            variables[COMMIT_VARIABLE] = self._store.commit
        if job.gpus:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        if 0 < job.gpus < self._num_gpus:
            variables[NOTE_VARIABLE] = BUSY_HOST
        with self._store.log_of(job).open("ab") as log:
            process = subprocess.Popen(
                self._store.words(job),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=variables,
                start_new_session=True,
            )
        begin = time.monotonic() - self._origin
        print(f"{begin:6.1f} s  begins {job.name} on {list(gpus)}", flush=True)
        self._running.append(Running(job, process, gpus, begin))

    def _look_after(self) -> None:
        now = time.monotonic() - self._origin
        for running in list(self._running):
            status = running.process.poll()
            if status is not None:
                self._end(running, "done" if status == 0 else "failed")
            elif now - running.begin > LIMIT_FACTOR * running.job.seconds:
                self._stop([running])
        if self._left() <= 0:
            self._stop(list(self._running))

    def _stop(self, runnings: Sequence[Running]) -> None:
        """Interrupt them as Ctrl-C would, and kill those that go on."""
        for number in (signal.SIGINT, signal.SIGKILL):
            deadline = time.monotonic() + min(GRACE_SECONDS, 10.0)
            for running in runnings:
                if running.process.poll() is None:
                    os.killpg(running.process.pid, number)
            for running in runnings:
                try:
                    running.process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    continue
        for running in runnings:
            self._end(running, "stopped")

    def _end(self, running: Running, status: str) -> None:
        self._running.remove(running)
        self._free = sorted((*self._free, *running.gpus))
        seconds = time.monotonic() - self._origin - running.begin
        keep_whole_lines(self._store.work_of(running.job))
        last = last_line(self._store.log_of(running.job))
        result = Result(running.job.name, status, round(seconds, 1), running.gpus, round(running.begin, 1), last)
        self._results.append(result)
        with (self._store.folder / "run.jsonl").open("a") as file:
            file.write(json.dumps({**result._asdict(), "beside": [other.job.name for other in self._running]}) + "\n")
        if status == "done":
            self._store.finish(running.job, result)
        print(f"{running.begin + seconds:6.1f} s  {status} {running.job.name} after {seconds:.1f} s", flush=True)


def python_path(given: str) -> str:
    """Where jobs find optplan, if it is not installed, and further packages."""
    folders = [given, os.environ.get("PYTHONPATH", "")]
    if find_spec("optplan") is None:
        subprocess.run([sys.executable, str(ROOT / ".ci" / "link_types.py")], check=True)
        folders.insert(0, str(ROOT / ".types"))
    return os.pathsep.join(folder for folder in folders if folder)


def pack(folder: Path, target: Path) -> None:
    """Put results, logs and marks into archives of at most `ARCHIVE_BYTES`; a file that is larger has one alone."""
    target.mkdir(parents=True, exist_ok=True)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    bins: list[list[Path]] = [[]]
    size = 0
    for path in paths:
        # Records are compressed already; what is text becomes smaller than this.
        if bins[-1] and size + path.stat().st_size > ARCHIVE_BYTES:
            bins.append([])
            size = 0
        bins[-1].append(path)
        size += path.stat().st_size
    for number, chosen in enumerate(bins, start=1):
        with tarfile.open(target / f"measured-{number}.tar.gz", "w:gz") as archive:
            for path in chosen:
                archive.add(path, path.relative_to(folder))


def print_plan(jobs: Sequence[Job], num_gpus: int) -> None:
    """When each job would begin if all took as long as they should, and when all would be through."""
    free_at, end = [0.0] * num_gpus, 0.0
    for job in jobs:
        if job.gpus > num_gpus:
            print(f"         {job.name}: needs {job.gpus} GPUs")
            continue
        chosen = sorted(range(num_gpus), key=lambda gpu: free_at[gpu])[: job.gpus]
        begin = max((free_at[gpu] for gpu in chosen), default=0.0)
        if job.gpus > 1:
            begin = max(free_at)
        for gpu in chosen:
            free_at[gpu] = begin + job.seconds
        end = max(end, begin + job.seconds)
        print(f"{begin:6.0f} s  {job.name:24} {job.seconds:5.0f} s on {sorted(chosen)}")
    print(f"{end:6.0f} s  through; {sum(job.seconds * max(job.gpus, 1) for job in jobs):.0f} GPU-seconds")


def print_table(jobs: Sequence[Job], results: Sequence[Result], store: Store) -> None:
    """One line a job, with the last words of those that did not end well."""
    found = {result.name: result for result in results}
    for job in jobs:
        result = found.get(job.name) or Result(job.name, "earlier", store.result_of(job)["seconds"])
        rows = sum(path.read_bytes().count(b"\n") for path in store.work_of(job).rglob("*.jsonl"))
        records = sum(1 for _ in store.work_of(job).rglob("*.json.gz"))
        line = f"{job.name:24} {result.status:8} {result.seconds:6.1f} s of {job.seconds:4.0f}"
        line += f"  {rows:3} rows {records:3} records"
        print(f"{line}  {result.last}")


if __name__ == "__main__":
    raise SystemExit(main())
