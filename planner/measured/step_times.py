"""Times of recorded steps in further processes: what the host has a part in differs from process to process.

They lie in a file beside the records, a line of JSON for each process that took a step again. The time of a step is the
median over all that took it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Literal

import msgspec

from optplan.planner.errors import ConfigError, shorten
from optplan.planner.measured.measurement import StepTime

FILE_NAME = "step_times.jsonl"
"""Of the file, in the folder of the records."""
SCHEMA: Literal["optplan.step-times/1"] = "optplan.step-times/1"
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=1e9)]


class ProcessTime(msgspec.Struct, frozen=True, kw_only=True):
    """What one process took for a recorded step: medians of its timed steps.

    Attributes:
        record: Name of the step's record, without its suffixes.
        step_seconds: The whole step.
        phases: Seconds of phases, those that were timed.
        num_steps: How many steps the medians are of.
        host_launch_seconds: What its host took to launch one operation, before the steps and after them; None where
            that was not measured.
        environment: Where and how it was measured.
    """

    record: str
    step_seconds: _Seconds
    phases: dict[str, float]
    num_steps: int
    host_launch_seconds: tuple[_Seconds | None, ...]
    environment: dict[str, str]
    schema: Literal["optplan.step-times/1"] = SCHEMA


class PooledTime(msgspec.Struct, frozen=True, kw_only=True):
    """The time of a step over all processes that took it.

    Attributes:
        step_seconds: Their median, of the whole step; `phases` likewise, of those processes that timed a phase.
        all_seconds: Every process's, the record's own first.
        host_launch_seconds: The mean of what their hosts took to launch one operation, None if nobody measured it.
    """

    step_seconds: float
    phases: dict[str, float]
    all_seconds: tuple[float, ...]
    host_launch_seconds: float | None


def read_process_times(folder: Path) -> dict[str, list[ProcessTime]]:
    """The times of further processes beside the records of a folder, by the records' names; none without the file.

    Raises:
        ConfigError: The file is damaged.
    """
    path, found = folder / FILE_NAME, dict[str, list[ProcessTime]]()
    if not path.is_file():
        return found
    try:
        times = msgspec.json.Decoder(ProcessTime).decode_lines(path.read_bytes())
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None
    except RecursionError:
        raise _unreadable(path, "its values are nested too deep") from None
    for time in times:
        found.setdefault(time.record, []).append(time)
    return found


def _unreadable(path: Path, reason: object) -> ConfigError:
    return ConfigError(f"{shorten(str(path))} cannot be read as times of steps: {reason}")


def pooled(time: StepTime | None, others: Sequence[ProcessTime]) -> PooledTime | None:
    """The record's own time with those of the others; None where the record has no time."""
    if time is None or time.step_seconds is None:
        return None
    seconds = (time.step_seconds, *(other.step_seconds for other in others))
    own = {str(name): seconds for name, seconds in time.phases.items()}
    phases = [own, *(other.phases for other in others)]
    launches = [(time.host_launch_seconds,), *(other.host_launch_seconds for other in others)]
    told = [fmean(known) for each in launches if (known := [one for one in each if one is not None])]
    return PooledTime(
        step_seconds=median(seconds),
        phases={name: median(p[name] for p in phases if name in p) for name in dict.fromkeys(chain(*phases))},
        all_seconds=seconds,
        host_launch_seconds=fmean(told) if told else None,
    )
