"""The trace engine against every step that `optplan validate` measured on H200s and that is committed."""

from __future__ import annotations

import json
import runpy
import tomllib
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from optplan.planner.measured.measurement import Measurement

ROOT = Path(__file__).parents[3]
RECORDS = ROOT / "tests" / "records"
BOUNDS: dict[str, Any] = tomllib.loads((RECORDS / "profile_bounds.toml").read_text(encoding="utf-8"))
SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "check_profiles.py"))
PROFILES: dict[str, Measurement] = {
    name: record for name, record in SCRIPT["read_profiles"]() if record.out_of_memory is None
}
SINGLE = [name for name in PROFILES if name.startswith("h200_profiles/")]
ROWS: dict[str, dict[str, Any]] = {
    row["record"]: row for row in json.loads((RECORDS / "traced_profiles.json").read_text(encoding="utf-8"))["rows"]
}


@pytest.fixture(scope="module")
def tracer() -> Any:
    return SCRIPT["Tracer"]()


def sizes(figures: dict[str, Any], record: Measurement) -> dict[str, float]:
    """How far each kind of figure is off, regardless of the sign; of the phases the worst."""
    peak, reserved = record.peak_allocated_bytes, record.peak_reserved_bytes
    assert peak and reserved
    phases = {name: record.phases[name].peak_allocated_bytes for name in figures["phases"]}
    return {
        "peak": abs(figures["peak_bytes"] / peak - 1),
        "phase": max(abs(figures["phases"][name] / measured - 1) for name, measured in phases.items()),
        "reserved": abs(figures["reserved_bytes"] / reserved - 1),
    }


def bounds(name: str) -> dict[str, float]:
    """What one record may be off."""
    folder, _, record = name.partition("/")
    apart = [row for row in BOUNDS[folder].get("apart", []) if row["record"] == record]
    return {kind: apart[0].get(kind, bound) if apart else bound for kind, bound in BOUNDS[folder]["worst"].items()}


@pytest.mark.parametrize("name", SINGLE)
def test_a_traced_step_is_the_measured_one(name: str, tracer: Any) -> None:
    # What is reserved differs with the version of transformers, as its models free tensors in another order.
    off, allowed = sizes(SCRIPT["figures_of"](tracer.peaks(PROFILES[name])), PROFILES[name]), bounds(name)
    assert off["peak"] <= allowed["peak"]
    assert off["phase"] <= allowed["phase"]


@pytest.mark.parametrize("name", [name for name in PROFILES if name in ROWS])
def test_a_step_traced_with_the_measured_version_is_the_measured_one(name: str) -> None:
    off, allowed = sizes(ROWS[name]["trace"], PROFILES[name]), bounds(name)
    assert {kind: size for kind, size in off.items() if size > allowed[kind]} == {}


def test_most_traced_steps_are_nearer_than_each_must_be() -> None:
    rows = [sizes(ROWS[name]["trace"], PROFILES[name]) for name in SINGLE if name in ROWS]
    assert len(rows) >= BOUNDS["h200_profiles"]["least_records"]
    for kind in ("peak", "phase", "reserved"):
        assert median(row[kind] for row in rows) <= BOUNDS["h200_profiles"]["median"][kind], kind


def test_on_two_gpus_each_way_of_sharing_has_a_traced_step() -> None:
    ways = {PROFILES[name].config.sharding for name in ROWS if name.startswith("h200x2_profiles/")}
    assert ways == {"ddp", "zero1", "fsdp2"}


def test_the_figures_are_of_records_that_are_there() -> None:
    assert ROWS.keys() <= {name for name, _ in SCRIPT["read_profiles"]()}
