"""The record of predictions held against measurements."""

from __future__ import annotations

from typing import Literal

import msgspec

from optplan.planner.timeline import Phase


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
    """All of them, and where the measurements were made."""

    schema: Literal["optplan.accuracy/1"] = "optplan.accuracy/1"
    version: str
    place: str
    rows: list[AccuracyRow]


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
