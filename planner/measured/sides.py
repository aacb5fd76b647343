"""What an estimate, a trace and a measurement have in common, so that they can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from optplan.planner.errors import ConfigError, shorten
from optplan.planner.measured.measurement import Environment, Measurement
from optplan.planner.measured.packed_history import unpack
from optplan.planner.measured.record_files import load_record
from optplan.planner.records import Estimate, EstimateReport, ResidentBytes, StepConfig
from optplan.planner.step_history import StepHistory
from optplan.planner.timeline import Category, Phase

Source = Literal["rules", "trace", "live"]

UNEXPLAINED: Category = "unexplained"
"""Category, and row, of what is allocated at the peak and whose owner was not found."""


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """One step with one optimizer, from whichever source; None or empty is what the source does not know."""

    label: str
    source: Source
    model: str
    optimizer: str
    implementation: str
    config: StepConfig
    details: dict[str, str]
    bytes: ResidentBytes
    state_tensors: dict[str, int]
    phases: dict[Phase, int] = {}
    categories: dict[Category, int] = {}
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    device_bytes: int | None = None
    step_seconds: float | None = None
    phase_seconds: Mapping[str, float] = {}
    tokens_per_second: float | None = None
    optimizer_copy_fraction: float | None = None
    host_launch_seconds: float | None = None
    history: StepHistory | None = None
    notes: list[str] = []

    @property
    def unexplained_bytes(self) -> int | None:
        """Bytes at the peak whose owner is not known."""
        if self.peak_allocated_bytes is None or not self.categories:
            return None
        known = sum(size for category, size in self.categories.items() if category != UNEXPLAINED)
        return self.peak_allocated_bytes - known


def sides_of(paths: list[str | Path]) -> list[Side]:
    """The records of several files, each as one side; of an estimate of several optimizers, those that a file asks for.

    An estimate that holds more than one optimizer gives the one that the measurements are of.

    Raises:
        ConfigError: A file cannot be read, or an estimate of several optimizers holds none of those measured.
    """
    records = [(Path(path), load_record(path)) for path in paths]
    measured = {(r.optimizer, r.implementation) for _, r in records if isinstance(r, Measurement)}
    sides: list[Side] = []
    for path, record in records:
        if isinstance(record, Measurement):
            sides.append(side_of_measurement(record, label=path.name))
        else:
            sides += [side_of_estimate(record, row, label=path.name) for row in _chosen(record, measured, path)]
    return _with_distinct_labels(sides)


def _chosen(report: EstimateReport, measured: set[tuple[str, str]], path: Path) -> list[Estimate]:
    if len(report.estimates) <= 1 or not measured:
        return report.estimates
    rows = [row for row in report.estimates if (row.optimizer, row.implementation) in measured]
    if not rows:
        wanted = ", ".join(sorted(f"{optimizer} ({implementation})" for optimizer, implementation in measured))
        raise ConfigError(f"{shorten(str(path))} holds no estimate for {wanted}, which the measurement is of")
    return rows


def side_of_estimate(report: EstimateReport, row: Estimate, *, label: str) -> Side:
    """One optimizer's row of an estimate."""
    return Side(
        label=label,
        source="trace" if report.engine == "trace" else "rules",
        model=report.model.name,
        optimizer=row.optimizer,
        implementation=row.implementation,
        config=report.config,
        details=_details(report.model.name, report.gpu.name, row.optimizer, row.implementation, row.options)
        | {"optplan": report.version},
        bytes=row.bytes,
        state_tensors=row.state_tensors,
        phases={phase: peak.peak_allocated_bytes for phase, peak in (row.phases or {}).items()},
        categories=dict(row.peak_categories or {}),
        peak_allocated_bytes=row.peak_allocated_bytes,
        peak_reserved_bytes=row.peak_reserved_bytes,
        device_bytes=row.device_bytes,
        step_seconds=(row.step_seconds or {}).get("step"),
        phase_seconds=_phase_seconds(row.step_seconds or {}),
    )


def _phase_seconds(step_seconds: Mapping[str, float]) -> dict[str, float]:
    """Predicted times by phase, named as measured ones are: `step` is the optimizer's, not the whole."""
    named = {"forward": "forward", "backward": "backward", "optimizer": "step"}
    return {named[part]: seconds for part, seconds in step_seconds.items() if part in named}


def side_of_measurement(record: Measurement, *, label: str) -> Side:
    """A measured or traced step."""
    time = record.time
    return Side(
        label=label,
        source=record.source,
        model=record.model.name,
        optimizer=record.optimizer,
        implementation=record.implementation,
        config=record.config,
        details=_details(
            record.model.name,
            record.gpu.name if record.gpu else record.device,
            record.optimizer,
            record.implementation,
            record.options,
        )
        | ({"state dtype": record.state_dtype} if record.state_dtype else {})
        | _environment(record.environment),
        bytes=record.bytes,
        state_tensors=record.state_tensors,
        phases={phase: peak.peak_allocated_bytes for phase, peak in record.phases.items()},
        categories=dict(record.peak_categories),
        peak_allocated_bytes=record.peak_allocated_bytes,
        peak_reserved_bytes=record.peak_reserved_bytes,
        device_bytes=record.device_bytes,
        step_seconds=time.step_seconds if time else None,
        phase_seconds={str(phase): seconds for phase, seconds in time.phases.items()} if time else {},
        tokens_per_second=time.tokens_per_second if time else None,
        optimizer_copy_fraction=time.optimizer_copy_fraction if time else None,
        host_launch_seconds=time.host_launch_seconds if time else None,
        history=unpack(record.history) if record.history else None,
        notes=record.notes,
    )


def _details(model: str, gpu: str, optimizer: str, implementation: str, options: dict[str, Any]) -> dict[str, str]:
    settings = ", ".join(f"{key}={value}" for key, value in options.items())
    return {"model": model, "gpu": gpu, "optimizer": f"{optimizer} ({implementation})", "options": settings}


def _environment(environment: Environment) -> dict[str, str]:
    named = {
        name: getattr(environment, name) for name in ("torch", "driver", "optplan", "date", "commit", "alloc_conf")
    }
    return {name: str(value) for name, value in named.items() if value}


def _with_distinct_labels(sides: list[Side]) -> list[Side]:
    """Labels that tell the sides apart: of equal ones the optimizer is named too, then the place in the list."""
    labels = [side.label for side in sides]
    named = [
        f"{label} {side.optimizer}" if labels.count(label) > 1 else label
        for label, side in zip(labels, sides, strict=True)
    ]
    numbered = [f"{label} #{index}" if named.count(label) > 1 else label for index, label in enumerate(named, start=1)]
    return [msgspec.structs.replace(side, label=label) for side, label in zip(sides, numbered, strict=True)]
