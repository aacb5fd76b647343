"""Measures the cases of a matrix, each in processes of its own, so that none finds another's memory or ends another."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from optplan.planner.errors import ConfigError, OptplanError, shorten
from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.record_files import load_record, save_record
from optplan.profilers.live.measure import INTERRUPTED
from optplan.profilers.validation import launching
from optplan.profilers.validation.launching import Launcher, Process
from optplan.profilers.validation.matrix import ValidationCase
from optplan.profilers.validation.ranks import arrange_meeting, has_failed, last_words

CASE_SECONDS = 300.0
"""After which a case that has not ended is ended."""
_PEER_SECONDS = 10.0
"""How long the others may take to end after a rank that failed: one that waits for it could wait for minutes."""
_POLL_SECONDS = 0.02


class Progress(msgspec.Struct, frozen=True):
    """How far a validation has come.

    Attributes:
        done: Cases measured now or before, or not to be measured here.
        total: Cases of the matrix.
        case: What is being measured, empty at the end.
    """

    done: int
    total: int
    case: str


class RunOutcome(msgspec.Struct, frozen=True):
    """What became of the cases.

    Attributes:
        measured: Names of the cases measured now.
        kept: Names of those that had a record already.
        failed: Those that ended without a record, with the last words of the process.
        left: Those for which the time did not suffice.
        skipped: Those that cannot be measured here, with the reason.
    """

    measured: list[str]
    kept: list[str]
    failed: dict[str, str]
    left: list[str]
    skipped: dict[str, str] = {}


class Limits(NamedTuple):
    """How a matrix is measured.

    Attributes:
        num_steps: Steps of each case.
        budget_seconds: No case is begun after so long; those that are running are allowed to end.
        keep_history: Whether a record keeps its step event by event, which makes it about a hundred times larger.
        case_seconds: A case that takes longer is ended.
    """

    num_steps: int
    budget_seconds: float
    keep_history: bool = False
    case_seconds: float = CASE_SECONDS


def run_cases(
    cases: Sequence[ValidationCase],
    folder: Path,
    *,
    launcher: Launcher,
    device: str,
    limits: Limits,
    places: Sequence[Mapping[str, str]] = ({},),
    refuse: Callable[[ValidationCase], str | None] = lambda _: None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> RunOutcome:
    """Measure what has no record in `folder` yet; a run that was stopped goes on where it ended.

    Args:
        cases: What to measure, in this order.
        folder: Where the records are kept, one file a case.
        launcher: Starts the processes.
        device: Where the steps run.
        limits: How many steps and how long.
        places: Where cases run at the same time: the environment variables that show a process its GPU.
        refuse: Why a case cannot be measured here, None if it can; asked while others run.
        progress: Told before each case and at the end.

    Raises:
        OptplanError: The folder cannot be made or written.
    """
    _make(folder)
    return _Matrix(folder, launcher, device, limits, places, progress).run(cases, refuse)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptplanError(f"cannot make {shorten(str(folder))}: {error.strerror or error}") from None


class _Running(msgspec.Struct):
    """A case whose processes run.

    Attributes:
        begin: When it was started.
        meeting: What is to be kept until its processes have ended.
        failed: When one of them was first seen to have failed while others went on, None if not yet.
    """

    case: ValidationCase
    path: Path
    places: list[int]
    processes: list[Process]
    begin: float
    meeting: Any = None
    failed: float | None = None


class _Matrix:
    """One run over the cases."""

    def __init__(
        self,
        folder: Path,
        launcher: Launcher,
        device: str,
        limits: Limits,
        places: Sequence[Mapping[str, str]],
        progress: Callable[[Progress], None],
    ) -> None:
        self._folder, self._launcher, self._device, self._limits = folder, launcher, device, limits
        self._places, self._progress = places, progress
        self._free = list(range(len(places)))
        self._running: list[_Running] = []
        self._outcome = RunOutcome([], [], {}, [], {})
        self._total = 0
        self._begin = time.monotonic()

    def run(self, cases: Sequence[ValidationCase], refuse: Callable[[ValidationCase], str | None]) -> RunOutcome:
        self._total = len(cases)
        try:
            for case in cases:
                self._take(case, refuse)
            while self._running:
                self._wait()
        except BaseException:
            self._stop()
            raise
        self._tell("")
        return self._outcome

    def _take(self, case: ValidationCase, refuse: Callable[[ValidationCase], str | None]) -> None:
        """Start a case once there is a place for it, if it is to be measured at all."""
        path = self._folder / f"{case.name}.json.gz"
        if path.exists():
            self._keep(case, path)
            return
        reason = refuse(case)
        if reason is not None:
            self._outcome.skipped[case.name] = reason
            return
        self._make_room(case)
        if time.monotonic() - self._begin > self._limits.budget_seconds:
            self._outcome.left.append(case.name)
        else:
            self._start(case, path)

    def _keep(self, case: ValidationCase, path: Path) -> None:
        """Count a record that is there; one that cannot be read is left alone, whatever it is, and told of."""
        try:
            load_record(path)
        except ConfigError as error:
            self._outcome.failed[case.name] = f"{error}; remove the file to measure the step again"
        else:
            self._outcome.kept.append(case.name)

    def _make_room(self, case: ValidationCase) -> None:
        """Wait for a place; a case of several processes runs alone."""
        while self._running and (case.num_gpus > 1 or not self._free or self._running[0].case.num_gpus > 1):
            self._wait()

    def _start(self, case: ValidationCase, path: Path) -> None:
        self._tell(case.name)
        words = ["profile", *case.arguments, "--device", self._device, "--steps", str(self._limits.num_steps)]
        words += ["--out", str(path), "--json"]
        places = [self._free.pop(0)] if case.num_gpus == 1 else []
        meeting = None if places else arrange_meeting(case.num_gpus)
        variables = meeting.variables if meeting else [dict(self._places[places[0]])]
        processes = [self._launcher.start("optplan", words, variable) for variable in variables]
        self._running.append(_Running(case, path, places, processes, time.monotonic(), meeting))

    def _wait(self) -> None:
        """Look after what runs, once."""
        time.sleep(_POLL_SECONDS)
        for running in list(self._running):
            if all(process.status is not None for process in running.processes):
                self._close(running, None)
            elif time.monotonic() - running.begin > self._limits.case_seconds:
                launching.end(running.processes)
                self._close(running, f"it did not end within {self._limits.case_seconds:.0f} s")
            elif self._waits_in_vain(running):
                failure = last_words(running.processes)
                launching.kill(running.processes)
                self._close(running, failure)

    def _waits_in_vain(self, running: _Running) -> bool:
        """Whether a rank has failed and the others have had their time to end."""
        if running.failed is None and has_failed(running.processes):
            running.failed = time.monotonic()
        return running.failed is not None and time.monotonic() - running.failed > _PEER_SECONDS

    def _close(self, running: _Running, failure: str | None) -> None:
        self._running.remove(running)
        self._free += running.places
        self._finish(running, failure)

    def _finish(self, running: _Running, failure: str | None) -> None:
        name, first = running.case.name, running.processes[0]
        if running.path.exists() and self._keeps(running):
            self._outcome.measured.append(name)
        elif first.status == launching.INTERRUPTED and failure is None:
            raise KeyboardInterrupt
        else:
            self._outcome.failed[name] = failure or last_words(running.processes)

    def _keeps(self, running: _Running) -> bool:
        """Whether the record is complete; one cut short is taken away, so that its case is measured again."""
        record = load_record(running.path)
        assert isinstance(record, Measurement)
        if INTERRUPTED in record.notes:
            running.path.unlink()
            return False
        kept = record if self._limits.keep_history else msgspec.structs.replace(record, history=None)
        if kept is not record:
            save_record(kept, running.path)
        return True

    def _stop(self) -> None:
        """End what runs; what is complete by then counts."""
        launching.end([process for running in self._running for process in running.processes])
        for running in self._running:
            if running.path.exists():
                with contextlib.suppress(OptplanError):
                    self._keeps(running)

    def _tell(self, case: str) -> None:
        done = sum(map(len, (self._outcome.measured, self._outcome.kept, self._outcome.failed, self._outcome.skipped)))
        self._progress(Progress(done, self._total, case))
