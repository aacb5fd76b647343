"""The page for a record, whatever it is of, and for files of records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from optplan.planner.errors import ConfigError, shorten
from optplan.planner.estimate_details import details_of
from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.record_files import Record, load_record
from optplan.planner.measured.sides import sides_of
from optplan.planner.measured.step_times import FILE_NAME as STEP_TIMES
from optplan.reports.html.comparison_page import comparison_page, measurement_page
from optplan.reports.html.estimate_page import estimate_page
from optplan.reports.html.training_page import training_page
from optplan.reports.html.training_runs import TrainingRun

_MANY_LINES = ".jsonl"


def record_page(record: Record) -> str:
    """An estimate, or a measured or traced step over what the rules say of it."""
    if isinstance(record, Measurement):
        return measurement_page(record)
    return estimate_page(record, details_of(record))


def files_page(paths: Sequence[str]) -> str:
    """The page of one record, of several beside each other, or of training runs in a file of lines.

    Raises:
        ConfigError: A file cannot be read or is no record, or training runs are mixed with others.
    """
    lines = [path for path in paths if path.endswith(_MANY_LINES) and Path(path).name != STEP_TIMES]
    if lines and len(lines) < len(paths):
        raise ConfigError(f"{shorten(lines[0])} holds training runs, which are not compared with other records")
    if lines:
        runs = [run for path in lines for run in load_runs(path)]
        return training_page(runs, source=", ".join(Path(path).name for path in lines))
    if len(paths) == 1:
        return record_page(load_record(paths[0]))
    return comparison_page(sides_of(list(paths)))


def load_runs(path: str) -> list[TrainingRun]:
    """The training runs of a file, one a line.

    Raises:
        ConfigError: The file cannot be read, or holds something else or no final run.
    """
    try:
        text = Path(path).read_bytes()
        runs = [msgspec.json.decode(line, type=TrainingRun) for line in text.splitlines() if line.strip()]
    except OSError as error:
        raise ConfigError(f"cannot read {shorten(path)}: {error.strerror or error}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{shorten(path)} is no file of training runs: {error}") from None
    if not any(run.stage == "final" and run.final_validation_loss is not None for run in runs):
        raise ConfigError(f"{shorten(path)} holds no finished run with its best learning rate")
    return runs
