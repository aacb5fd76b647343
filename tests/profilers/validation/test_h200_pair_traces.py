"""Steps traced for one of two ranks, whose peer is made up, against the records of `optplan validate` on two H200s."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.record_files import load_record
from optplan.planner.workload import StepPeaks
from optplan.profilers.validation.record_tracing import RecordTracer

FOLDER = Path(__file__).parents[2] / "records" / "h200x2_profiles"
ALL = {path.name.removesuffix(".json.gz"): load_record(path) for path in sorted(FOLDER.glob("*.json.gz"))}
RECORDS: dict[str, Measurement] = {
    name: record
    for name, record in ALL.items()
    if isinstance(record, Measurement) and "unexplained" not in record.peak_categories
}
ALLOWED = 0.0002
"""Share of the peak; the promise is half a percent."""


@pytest.fixture(scope="module")
def traces() -> dict[str, StepPeaks]:
    tracer = RecordTracer()
    return {name: tracer.peaks(record) for name, record in RECORDS.items()}


def differences(peaks: StepPeaks, record: Measurement) -> dict[str, int]:
    """Traced less measured bytes of every category that either of the two names."""
    found: dict[Any, int] = dict(peaks.categories)
    return {
        key: found.get(key, 0) - record.peak_categories.get(key, 0) for key in found.keys() | record.peak_categories
    }


@pytest.mark.parametrize("name", RECORDS)
def test_a_rank_with_a_made_up_peer_holds_what_was_measured_by_category(
    name: str, traces: dict[str, StepPeaks]
) -> None:
    peaks, record = traces[name], RECORDS[name]
    most = record.peak_allocated_bytes
    assert most
    assert peaks.categories.keys() == record.peak_categories.keys()
    assert abs(peaks.peak_bytes - most) <= ALLOWED * most
    assert {key: size for key, size in differences(peaks, record).items() if abs(size) > ALLOWED * most} == {}
    assert peaks.peak_phase == record.peak_phase


def test_every_way_of_sharing_is_among_them() -> None:
    assert len(RECORDS) >= 7
    assert {record.config.sharding for record in RECORDS.values()} == {"ddp", "zero1", "fsdp2"}
    assert {record.optimizer for record in RECORDS.values()} == {"adamw", "micro-adam"}
