"""Today's rules against every step that `optplan validate` measured on H200s and that is committed.

`tests/records/profile_bounds.toml` says how far they may be off.
"""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import pytest

from optplan.planner.measured.expectation import expect
from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.record_files import load_record
from optplan.planner.measured.validation import Judgement, judge
from optplan.planner.records import EstimateReport
from optplan.planner.step.simulated_device import SimulatedDevice

RECORDS = Path(__file__).parents[2] / "records"
BOUNDS: dict[str, Any] = tomllib.loads((RECORDS / "profile_bounds.toml").read_text(encoding="utf-8"))
FOLDERS = [name for name in BOUNDS if (RECORDS / name).is_dir()]
NAMES = [
    f"{folder}/{path.name.removesuffix('.json.gz')}"
    for folder in FOLDERS
    for path in sorted((RECORDS / folder).glob("*.json.gz"))
]
GPU = "NVIDIA H200"


@cache
def measured(name: str) -> Measurement:
    record = load_record(RECORDS / f"{name}.json.gz")
    assert isinstance(record, Measurement)
    return record


class Meter:
    """An allocator, and the most bytes allocated and asked for at once."""

    def __init__(self, allocator: Any) -> None:
        self.allocator, self.allocated, self.asked = allocator, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.allocator, name)

    def alloc(self, num_bytes: int, *, stream: int) -> Any:
        block = self.allocator.alloc(num_bytes, stream=stream)
        self.allocated = max(self.allocated, self.allocator.allocated_bytes)
        self.asked = max(self.asked, self.allocator.requested_bytes)
        return block


@cache
def metered(name: str) -> tuple[EstimateReport, list[Meter]]:
    """The estimate, and a meter for each part of a measured step that was simulated for it."""
    meters: list[Meter] = []
    measure = SimulatedDevice.measure

    def measure_metered(device: Any, *args: Any) -> None:
        device._allocator = Meter(device._allocator)
        meters.append(device._allocator)
        measure(device, *args)
        device._allocator = device._allocator.allocator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimulatedDevice, "measure", measure_metered)
        return expect(measured(name)), meters


def estimated(name: str) -> EstimateReport:
    return metered(name)[0]


@cache
def judged(name: str) -> Judgement:
    return judge(measured(name), name=name, report=estimated(name))


def nearest(name: str) -> Judgement:
    """The judgement by the nearer of the ends of what may stay reserved."""
    (row,) = estimated(name).estimates
    found, record = judged(name), measured(name)
    ends, shown, reserved, device = (
        row.peak_reserved_range_bytes, row.peak_reserved_bytes, record.peak_reserved_bytes, record.device_bytes,
    )  # fmt: skip
    if ends is None:
        return found
    assert shown and reserved and device and found.device_error is not None
    end = min(ends, key=lambda size: abs(size - reserved))
    device_error = found.device_error + (end - shown) / device
    return msgspec.structs.replace(found, reserved_error=end / reserved - 1, device_error=device_error)


def sizes(row: Judgement) -> dict[str, float]:
    """How far each kind of figure is off, regardless of the sign; of the phases the worst."""
    found = {"peak": row.peak_error, "reserved": row.reserved_error, "device": row.device_error}
    found["phase"] = max(map(abs, row.phase_errors.values()), default=None)
    return {kind: abs(error) for kind, error in found.items() if error is not None}


def bounds(name: str) -> dict[str, float]:
    """What one record may be off."""
    folder, _, record = name.partition("/")
    apart = [row for row in BOUNDS[folder].get("apart", []) if row["record"] == record]
    return {kind: apart[0].get(kind, bound) if apart else bound for kind, bound in BOUNDS[folder]["worst"].items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_step_was_as_it_is_estimated(name: str) -> None:
    record, (row,) = measured(name), estimated(name).estimates
    assert row.state_tensors == record.state_tensors
    assert (row.bytes.parameters, row.bytes.optimizer_state) == (record.bytes.parameters, record.bytes.optimizer_state)
    assert row.bytes == record.bytes or record.config.gpus > 1  # of several, when gradients are whole is a question
    if record.out_of_memory is not None:
        assert row.fits is False
        return
    off, allowed = sizes(nearest(name)), bounds(name)
    assert off.keys() == allowed.keys()
    assert {kind: size for kind, size in off.items() if size > allowed[kind]} == {}


NEW = [name for name in NAMES if measured(name).peak_requested_bytes is not None]
"""Records that say what was asked for at the peak."""


@pytest.mark.parametrize("name", NEW)
def test_what_is_asked_for_at_the_peak_is_the_measured_to_the_byte(name: str) -> None:
    record, (row,) = measured(name), estimated(name).estimates
    at_peak = {meter.asked for meter in metered(name)[1] if meter.allocated == row.peak_allocated_bytes}
    loss = 4 if record.peak_phase == "step" else 0  # alive while the optimizer steps
    assert record.peak_requested_bytes is not None
    assert at_peak == {record.peak_requested_bytes - loss}


def test_most_records_say_what_was_asked_for() -> None:
    assert len(NEW) >= 91


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("h200x2_profiles/")])
def test_every_rank_is_near_the_estimate(name: str) -> None:
    record, (row,) = measured(name), estimated(name).estimates
    assert [rank.rank for rank in record.ranks] == list(range(record.config.gpus))
    assert row.peak_allocated_bytes is not None
    for rank in record.ranks:
        assert rank.peak_allocated_bytes == pytest.approx(row.peak_allocated_bytes, rel=bounds(name)["peak"])
        assert rank.bytes.parameters == row.bytes.parameters
        assert rank.bytes.gradients == row.bytes.gradients


@pytest.mark.parametrize("folder", FOLDERS)
def test_most_steps_are_nearer_than_each_must_be(folder: str) -> None:
    rows = [sizes(nearest(name)) for name in NAMES if name.startswith(f"{folder}/")]
    medians = {kind: median(row[kind] for row in rows if kind in row) for kind in BOUNDS[folder]["median"]}
    assert {kind: size for kind, size in medians.items() if size > BOUNDS[folder]["median"][kind]} == {}


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_record_is_missing(folder: str) -> None:
    names = {name.partition("/")[2] for name in NAMES if name.startswith(f"{folder}/")}
    assert len(names) >= BOUNDS[folder]["least_records"]
    assert {row["record"] for row in BOUNDS[folder].get("apart", [])} <= names


@pytest.mark.parametrize("name", NAMES)
def test_the_record_says_where_it_was_made(name: str) -> None:
    place = measured(name).environment
    assert (place.gpu, place.world_size) == (GPU, measured(name).config.gpus)
    assert all([place.driver, place.torch, place.triton, place.transformers, place.commit, place.date, place.command])


def test_the_records_of_one_gpu_span_what_was_promised() -> None:
    records = [measured(name) for name in NAMES if name.startswith("h200_profiles/")]
    kinds = {(record.optimizer, record.implementation) for record in records}
    assert kinds >= {
        ("adamw", "optplan"), ("adam-mini", "optplan"), ("adapprox", "optplan"), ("micro-adam", "optplan"),
        ("adamw", "fused"), ("adamw", "foreach"), ("sgd", "fused"), ("adafactor", "torch"), ("adam-mini", "official"),
        ("adamw-8bit", "bitsandbytes"),
    }  # fmt: skip
    sizes_of_models = sorted({record.model.num_parameters for record in records})
    assert len(sizes_of_models) >= 8
    assert sizes_of_models[0] < 125e6 and sizes_of_models[-1] > 8e9
    assert {record.config.precision for record in records} == {"bf16", "amp", "fp32"}
    assert {record.config.checkpointing for record in records} == {"none", "full"}


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_llama_2_7b_is_trained_whole_with_micro_adam_in_less_than_40_gb(checkpointing: str) -> None:
    """The first page of the paper (arXiv 2405.15593) promises it of one card of 40 GB."""
    name = f"h200_profiles/llama-2-7b_micro-adam_batch_size=1_seq_len=2048_checkpointing={checkpointing}"
    record = measured(name)
    assert (record.model.num_parameters, record.config.precision) == (6_738_415_616, "bf16")
    assert (record.options["window"], record.options["density"]) == (10, 0.01)
    assert record.device_basis == "process"
    assert record.device_bytes is not None and record.device_bytes < 40 * 10**9
    (row,) = estimated(name).estimates
    assert row.device_bytes is not None and row.device_bytes < 40 * 10**9
