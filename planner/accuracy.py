"""The record of predictions held against measurements."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

from optplan.planner.errors import ConfigError, shorten
from optplan.planner.measured.expectation import expect
from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.record_files import load_record
from optplan.planner.rivals import Rivals, compared_rivals
from optplan.planner.timeline import Phase
from optplan.planner.version import VERSION


class AccuracyRow(msgspec.Struct, frozen=True, kw_only=True):
    """One measured step and today's estimate of it; None where the rules do not predict it.

    Attributes:
        more: Further options of the step, in words.
        measured_phases: Peak allocated bytes of each phase as measured; likewise `predicted_phases`.
        state_is_exact: Whether parameters and optimizer state equal the estimate to the byte.
        record: The file that holds the measurement.
    """

    model: str
    precision: str
    optimizer: str
    implementation: str
    batch_size: int
    seq_len: int
    grad_accum: int
    checkpointing: str
    attention: str
    more: str = ""
    measured_peak_bytes: int
    predicted_peak_bytes: int | None
    measured_reserved_bytes: int
    predicted_reserved_bytes: int | None
    measured_phases: dict[Phase, int]
    predicted_phases: dict[Phase, int]
    state_is_exact: bool
    record: str

    @property
    def setting(self) -> str:
        """Everything but the model in a few words."""
        accumulated = f", {self.grad_accum} accumulated" if self.grad_accum > 1 else ""
        more = f", {self.more}" if self.more else ""
        return (
            f"{self.optimizer} ({self.implementation}), {self.precision}, {self.batch_size} x {self.seq_len}"
            f"{accumulated}, checkpointing {self.checkpointing}, {self.attention}{more}"
        )

    @property
    def peak_error(self) -> float | None:
        """Predicted over measured peak, less one."""
        return relative_error(self.predicted_peak_bytes, self.measured_peak_bytes)

    @property
    def reserved_error(self) -> float | None:
        """Predicted over measured reserved bytes, less one."""
        return relative_error(self.predicted_reserved_bytes, self.measured_reserved_bytes)


class AccuracyReport(msgspec.Struct, frozen=True, kw_only=True):
    """All of them, and where the measurements were made.

    Attributes:
        rivals: What other estimators say of the steps that are measured for everyone to see.
    """

    schema: Literal["optplan.accuracy/1"] = "optplan.accuracy/1"
    version: str
    place: str
    rows: list[AccuracyRow]
    rivals: Rivals | None = None


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """What the measurements say of the predictions, in a few figures.

    Attributes:
        place: Where they were made.
        num_steps: Measured steps that the rules predict.
        num_exact: How many of all measured steps have the predicted parameters and state to the byte.
        num_measured: How many those are.
        median_error: Median of the absolute relative errors of the peak; likewise the largest.
        share_within_band: Share of the steps whose peak is predicted within 1 %.
    """

    place: str
    num_steps: int
    num_exact: int
    num_measured: int
    median_error: float
    largest_error: float
    share_within_band: float
    median_reserved_error: float
    largest_reserved_error: float


def relative_error(predicted: int | None, measured: int) -> float | None:
    """Predicted over measured, less one; None without a prediction."""
    return None if predicted is None or not measured else predicted / measured - 1


def accuracy_of(paths: Iterable[Path]) -> AccuracyReport:
    """Saved measurements beside today's estimates; those that cannot be estimated are left out.

    Raises:
        ConfigError: A file is no measurement, or nothing is left.
    """
    rows, places = [], []
    for path in sorted(paths):
        record = load_record(path)
        if not isinstance(record, Measurement):
            raise ConfigError(f"{shorten(str(path))} is no measurement but {record.schema}")
        with suppress(ConfigError):
            rows += _row(record, path.name)
            places.append(record.environment.gpu or "a CPU")
    if not any(row.peak_error is not None for row in rows):
        raise ConfigError("none of the records holds a peak that can be held against an estimate")
    place = ", ".join(dict.fromkeys(places))
    return AccuracyReport(version=VERSION, place=place, rows=rows, rivals=compared_rivals())


def _row(record: Measurement, name: str) -> list[AccuracyRow]:
    """The record beside its estimate; none where it has no peaks."""
    (row,) = expect(record).estimates
    config = record.config
    if record.peak_allocated_bytes is None or record.out_of_memory is not None:
        return []
    return [
        AccuracyRow(
            model=record.model.name,
            precision=config.precision,
            optimizer=record.optimizer,
            implementation=record.implementation,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            grad_accum=config.grad_accum,
            checkpointing=config.checkpointing,
            attention=config.attention,
            measured_peak_bytes=record.peak_allocated_bytes,
            predicted_peak_bytes=row.peak_allocated_bytes,
            measured_reserved_bytes=record.peak_reserved_bytes or 0,
            predicted_reserved_bytes=row.peak_reserved_bytes,
            measured_phases={phase: peak.peak_allocated_bytes for phase, peak in record.phases.items()},
            predicted_phases={phase: peak.peak_allocated_bytes for phase, peak in (row.phases or {}).items()},
            state_is_exact=row.bytes.optimizer_state == record.bytes.optimizer_state,
            record=name,
        )
    ]
