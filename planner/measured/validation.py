"""Measured steps held against today's estimates: the accuracy that the product may claim."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Literal

import msgspec

from optplan.planner.errors import ConfigError, shorten
from optplan.planner.measured.expectation import expect
from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.record_files import load_record
from optplan.planner.measured.step_times import FILE_NAME, PooledTime, ProcessTime, pooled, read_process_times
from optplan.planner.records import EstimateReport
from optplan.planner.timeline import Phase
from optplan.planner.version import VERSION
from optplan.planner.workload import StepPeaks


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """One measured step beside the estimate of it; errors are predicted less measured, as a share of measured.

    Attributes:
        record: Name of the record.
        model: Model; likewise `optimizer`, `implementation`, `precision`, `batch_size`, `seq_len`, `checkpointing`,
            `attention`, `gpu`.
        state_difference_bytes: Predicted less measured bytes of optimizer state, unrounded; 0 is what is promised.
        parameters_difference_bytes: The same for the parameters.
        peak_allocated_bytes: Measured.
        peak_error: Error of peak allocated; likewise `reserved_error`, `device_error`, `step_seconds_error`, None
            where one of the two sides does not say.
        step_seconds: Measured time of the step: the median over all processes that took it.
        num_processes: How many they are, or 0 if no time was measured; of processes that took it together on several
            GPUs the first alone counts. `step_seconds_spread` says how far each is from their median, the record's own
            first, where they are more than two.
        host_launch_seconds: What launching one operation took on the hosts of those processes, in the mean: the host
            that the time is predicted for. None where nobody measured it, and the model's own host is taken.
        phase_errors: Error of the peak of each phase that both sides know.
        trace_peak_error: Error of peak allocated by the trace engine, None where it was not asked; likewise
            `trace_reserved_error`.
        out_of_memory: Whether the step ran out of memory, which leaves no peaks to compare.
        verdict_right: For a step that ran out of memory, whether the estimate says that it does not fit.
    """

    record: str
    model: str
    optimizer: str
    implementation: str
    precision: str
    batch_size: int
    seq_len: int
    checkpointing: str
    attention: str
    gpu: str
    state_difference_bytes: int | None
    parameters_difference_bytes: int
    peak_allocated_bytes: int | None
    peak_error: float | None
    reserved_error: float | None
    device_error: float | None
    step_seconds_error: float | None
    phase_errors: dict[Phase, float]
    trace_peak_error: float | None = None
    trace_reserved_error: float | None = None
    out_of_memory: bool = False
    verdict_right: bool | None = None
    step_seconds: float | None = None
    num_processes: int = 0
    step_seconds_spread: list[float] = []
    host_launch_seconds: float | None = None


class Spread(msgspec.Struct, frozen=True):
    """How large one error is over all records, regardless of its sign.

    Attributes:
        metric: Which; `step_seconds_spread` is how far single processes are from the median of their step.
        count: Of how many records it is known.
    """

    metric: str
    count: int
    median: float
    worst: float
    worst_record: str


class ValidationReport(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `optplan validate`.

    Attributes:
        state_exact: Records whose state bytes are predicted to the byte.
        state_known: Records that tell state bytes.
        skipped: Records that cannot be read or estimated, with the reason.
    """

    schema: Literal["optplan.validation/1"] = "optplan.validation/1"
    version: str
    state_exact: int
    state_known: int
    spreads: list[Spread]
    judgements: list[Judgement]
    skipped: dict[str, str] = {}

    @property
    def is_exact(self) -> bool:
        """Whether the state of every record is predicted to the byte."""
        return self.state_exact == self.state_known


Trace = Callable[[Mapping[str, Measurement]], Mapping[str, StepPeaks | str]]
"""What the trace engine says of records by name: peaks, or why there are none."""


def validate_records(paths: Iterable[str | Path], *, trace: Trace | None = None) -> ValidationReport:
    """Hold saved measurements against today's rules; a file that cannot be is told of and keeps no other from it.

    Args:
        paths: The files; times of further processes are read from a `step_times.jsonl` beside them.
        trace: Asks the trace engine too.
    """
    records, judgements = dict[str, Measurement](), dict[str, Judgement]()
    kept = sorted(path for path in map(Path, paths) if path.name != FILE_NAME)
    others, skipped = _further_times(path.parent for path in kept)
    for path in kept:
        name = path.name.removesuffix(".gz").removesuffix(".json")
        try:
            record = load_record(path)
            if not isinstance(record, Measurement):
                raise ConfigError(f"{shorten(str(path))} is no measurement but {record.schema}")
            judgements[path.name] = judge(record, name=name, others=others[path.parent].get(name, ()))
            records[path.name] = record
        except ConfigError as error:
            skipped[path.name] = str(error)
    if trace is not None:
        skipped |= _add_traces(judgements, records, trace)
    rows = list(judgements.values())
    known = [row for row in rows if row.state_difference_bytes is not None]
    return ValidationReport(
        version=VERSION,
        state_exact=sum(row.state_difference_bytes == 0 for row in known),
        state_known=len(known),
        spreads=_spreads(rows),
        judgements=rows,
        skipped=skipped,
    )


def _further_times(folders: Iterable[Path]) -> tuple[dict[Path, dict[str, list[ProcessTime]]], dict[str, str]]:
    """The times of further processes in each folder, by record, and what kept one from being read."""
    found, damaged = dict[Path, dict[str, list[ProcessTime]]](), dict[str, str]()
    for folder in dict.fromkeys(folders):
        try:
            found[folder] = read_process_times(folder)
        except ConfigError as error:
            found[folder], damaged[FILE_NAME] = {}, str(error)
    return found, damaged


def _add_traces(judgements: dict[str, Judgement], records: Mapping[str, Measurement], trace: Trace) -> dict[str, str]:
    """Add the trace engine's errors to the judgements of steps that came through; why some have none, by name."""
    through = {name: record for name, record in records.items() if record.out_of_memory is None}
    untraced = {}
    for name, peaks in trace(through).items():
        if isinstance(peaks, str):
            untraced[f"{name}, traced"] = peaks
            continue
        record = through[name]
        judgements[name] = msgspec.structs.replace(
            judgements[name],
            trace_peak_error=_error(peaks.peak_bytes, record.peak_allocated_bytes),
            trace_reserved_error=_error(peaks.reserved_bytes, record.peak_reserved_bytes),
        )
    return untraced


def judge(
    record: Measurement, *, name: str, report: EstimateReport | None = None, others: Sequence[ProcessTime] = ()
) -> Judgement:
    """One measurement beside today's estimate.

    Args:
        record: The measurement.
        name: What the judgement calls it.
        report: The estimate, where the caller has it, for the mean host of all processes.
        others: Times of further processes that took the step.

    Raises:
        ConfigError: The step cannot be estimated.
    """
    time = pooled(record.time, others)
    host = time.host_launch_seconds if time else None
    row = (report or expect(record, host_launch_seconds=host)).estimates[0]
    config = record.config
    stopped = record.out_of_memory is not None
    phases: dict[Phase, float] = {}
    for phase, peak in ({} if stopped else record.phases).items():
        if row.phases and phase in row.phases:
            phases[phase] = _error(row.phases[phase].peak_allocated_bytes, peak.peak_allocated_bytes) or 0.0
    return Judgement(
        record=name,
        model=record.model.name,
        optimizer=record.optimizer,
        implementation=record.implementation,
        precision=config.precision,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        checkpointing=config.checkpointing,
        attention=config.attention,
        gpu=record.gpu.name if record.gpu else "",
        state_difference_bytes=row.bytes.optimizer_state - record.bytes.optimizer_state
        if record.state_tensors or not stopped
        else None,
        parameters_difference_bytes=row.bytes.parameters - record.bytes.parameters,
        peak_allocated_bytes=record.peak_allocated_bytes,
        peak_error=None if stopped else _error(row.peak_allocated_bytes, record.peak_allocated_bytes),
        reserved_error=None if stopped else _error(row.peak_reserved_bytes, record.peak_reserved_bytes),
        device_error=None if stopped else _error(row.device_bytes, record.device_bytes),
        step_seconds_error=_error((row.step_seconds or {}).get("step"), time.step_seconds if time else None),
        step_seconds=time.step_seconds if time else None,
        num_processes=len(time.all_seconds) if time else 0,
        step_seconds_spread=_spread_of(time) if time else [],
        host_launch_seconds=host,
        phase_errors=phases,
        out_of_memory=stopped,
        verdict_right=row.fits is False if stopped else None,
    )


def _spread_of(time: PooledTime) -> list[float]:
    """How far each process is from the median of all; nothing for two, which are equally far from it."""
    return [one / time.step_seconds - 1 for one in time.all_seconds] if len(time.all_seconds) > 2 else []


def _error(predicted: float | None, measured: float | None) -> float | None:
    return None if predicted is None or not measured else predicted / measured - 1


def _spreads(rows: Sequence[Judgement]) -> list[Spread]:
    metrics = ["peak_error", "reserved_error", "device_error", "step_seconds_error"]
    metrics += ["trace_peak_error", "trace_reserved_error"]
    values = {metric: [(row, getattr(row, metric)) for row in rows] for metric in metrics}
    values["step_seconds_spread"] = [(row, error) for row in rows for error in row.step_seconds_spread]
    for phase in dict.fromkeys(phase for row in rows for phase in row.phase_errors):
        values[f"{phase}_error"] = [(row, row.phase_errors.get(phase)) for row in rows]
    return [spread for metric, pairs in values.items() if (spread := _spread(metric, pairs)) is not None]


def _spread(metric: str, pairs: Sequence[tuple[Judgement, float | None]]) -> Spread | None:
    known = [(abs(error), row.record) for row, error in pairs if error is not None]
    if not known:
        return None
    worst, name = max(known)
    count = len({id(row) for row, error in pairs if error is not None})
    return Spread(metric, count, median(error for error, _ in known), worst, name)
