"""Measures the cases of a matrix, each in a process of its own, so that none finds another's memory or ends another."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from optplan.planner.errors import OptplanError, shorten
from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.record_files import load_record, save_record
from optplan.profilers.validation.matrix import ValidationCase

_LAST_LINE = 300
Command = Callable[[ValidationCase, Path], list[str]]


class Progress(msgspec.Struct, frozen=True):
    """How far a validation has come.

    Attributes:
        done: Cases measured now or before.
        total: Cases of the matrix that fit on this GPU.
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
    """

    measured: list[str]
    kept: list[str]
    failed: dict[str, str]
    left: list[str]


def run_cases(
    cases: Sequence[ValidationCase],
    folder: Path,
    *,
    device: str,
    num_steps: int,
    budget_seconds: float,
    keep_history: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> RunOutcome:
    """Measure what has no record in `folder` yet; a run that was stopped goes on where it ended.

    Args:
        cases: What to measure, in this order.
        folder: Where the records are kept, one file a case.
        device: Where the steps run.
        num_steps: Steps of each.
        budget_seconds: No case is begun after so long; one that is running is allowed to end.
        keep_history: Whether a record keeps its step event by event, which makes it about a hundred times larger.
        progress: Told before each case and at the end.

    Raises:
        OptplanError: The folder cannot be made or written.
    """
    _make(folder)
    begin = time.monotonic()
    outcome = RunOutcome([], [], {}, [])
    for index, case in enumerate(cases):
        path = folder / f"{case.name}.json.gz"
        if path.exists():
            outcome.kept.append(case.name)
        elif time.monotonic() - begin > budget_seconds:
            outcome.left.append(case.name)
        else:
            progress(Progress(index, len(cases), case.name))
            failure = _measure(case, path, device=device, num_steps=num_steps)
            if failure is not None:
                outcome.failed[case.name] = failure
                continue
            if not keep_history:
                _drop_history(path)
            outcome.measured.append(case.name)
    progress(Progress(len(cases) - len(outcome.left), len(cases), ""))
    return outcome


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptplanError(f"cannot make {shorten(str(folder))}: {error.strerror or error}") from None


def _measure(case: ValidationCase, path: Path, *, device: str, num_steps: int) -> str | None:
    """Run one case; None if it left a record, else the last words of its process."""
    words = [sys.executable, "-m", "optplan", "profile", *case.arguments, "--device", device]
    words += ["--steps", str(num_steps), "--out", str(path), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if path.exists():
        return None
    if done.returncode == _INTERRUPTED:
        raise KeyboardInterrupt
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return said[-1][:_LAST_LINE] if said else f"the process ended with status {done.returncode}"


_INTERRUPTED = 130


def _drop_history(path: Path) -> None:
    record = load_record(path)
    if isinstance(record, Measurement) and record.history is not None:
        save_record(msgspec.structs.replace(record, history=None), path)
