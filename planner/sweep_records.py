"""What a sweep prints: one row a combination, in a stable order."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class SweepRow(msgspec.Struct, frozen=True, kw_only=True):
    """One combination of the grid; bytes per GPU, peaks in allocated bytes of a steady step.

    Attributes:
        usable_bytes: What the GPU leaves to torch's allocator.
        limit_bytes: What the step may need: the usable bytes, or the budget if that is less.
        options: The optimizer's options that are not defaults.
        gpus: GPUs that work together; `sharding` is how they divide the work, none on one.
        batch_size: Sequences of one micro-batch on one GPU; `grad_accum` is how many of them make a step.
        parameters_bytes: Resident parameters; this and what follows is None where `reason` says why.
        peak_allocated_bytes: Largest number of allocated bytes, None for a family without step rules.
        device_bytes: Reserved bytes and the GPU's context.
        headroom_bytes: The limit less the peak.
        fits: Whether steps run within the limit; None if only the resident bytes are known and they are.
        step_seconds: Time of one step by the model of `optplan estimate`, None where it says nothing.
        tokens_per_second: Of all GPUs together.
        reason: Why this combination cannot run, None if it can.
    """

    model: str
    gpu: str
    gpus: int
    sharding: str
    usable_bytes: int
    limit_bytes: int
    optimizer: str
    implementation: str
    options: dict[str, Any]
    precision: str
    batch_size: int
    seq_len: int
    grad_accum: int
    checkpointing: str
    attention: str
    num_parameters: int
    parameters_bytes: int | None = None
    gradients_bytes: int | None = None
    master_weights_bytes: int | None = None
    optimizer_state_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    peak_phase: str | None = None
    peak_reserved_bytes: int | None = None
    device_bytes: int | None = None
    headroom_bytes: int | None = None
    fits: bool | None = None
    step_seconds: float | None = None
    tokens_per_second: float | None = None
    reason: str | None = None


class SweepReport(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `optplan sweep`.

    Attributes:
        budget_bytes: What every step must stay within besides its GPU, None if nothing was said.
        axes: The values of each axis in the order of the rows, first axis slowest; one GPU comes once and without
            sharding.
        rows: One a combination.
    """

    schema: Literal["optplan.sweep/1"] = "optplan.sweep/1"
    version: str
    budget_bytes: int | None
    axes: dict[str, list[Any]]
    rows: list[SweepRow]
    notes: list[str] = []

    @property
    def violations(self) -> list[str]:
        """One line for each combination that is not known to fit."""
        return [violation for row in self.rows if (violation := violation_of(row)) is not None]


def violation_of(row: SweepRow) -> str | None:
    """Why a row is not known to fit, None if it is."""
    several = f"{row.gpus} x {row.gpu} under {row.sharding}" if row.gpus > 1 else row.gpu
    where = (
        f"{row.model} on {several}: {row.optimizer} ({row.implementation}), batch {row.batch_size}, "
        f"sequence {row.seq_len}, {row.precision}, checkpointing {row.checkpointing}"
    )
    if row.reason is not None:
        return f"{where}: cannot run: {row.reason}"
    if row.fits:
        return None
    if row.headroom_bytes is not None and row.headroom_bytes >= 0:
        return f"{where}: fits by bytes, but fragmentation leaves no room"
    if row.peak_allocated_bytes is not None:
        over = row.peak_allocated_bytes - row.limit_bytes
        return f"{where}: needs {row.peak_allocated_bytes} bytes, {over} more than the {row.limit_bytes} allowed"
    if row.fits is None:
        return f"{where}: its peak is not predicted"
    return f"{where}: its resident bytes alone are more than the {row.limit_bytes} allowed"
