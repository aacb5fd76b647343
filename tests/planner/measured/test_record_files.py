"""Records on disk: what is saved is read back, and what is no record is refused in a sentence."""

import gzip
import json
import resource
import signal
from pathlib import Path

import msgspec
import pytest

from optplan.planner.errors import ConfigError, OptplanError
from optplan.planner.estimate import estimate
from optplan.planner.measured.measurement import Environment, Measurement, StepTime
from optplan.planner.measured.packed_history import pack, unpack
from optplan.planner.measured.record_files import check_target, load_record, save_record
from optplan.planner.records import GpuRow, ModelRow, PhasePeak, ResidentBytes, StepConfig
from optplan.planner.replay import LiveTensor
from optplan.planner.step_history import StepHistory
from optplan.planner.timeline import Allocation, Free

HISTORY = StepHistory(
    [LiveTensor("weight", "parameters", 1024)],
    [
        Allocation(2, 900, "activations", "hidden", "forward", 2),
        Free(2, "backward"),
        Allocation(3, 4, "gradients", "weight", "backward", 4),
        Free(1, "step"),
    ],
    [1024, 2048, 1024, 1536, 512],
    2**21,
)
RECORD = Measurement(
    version="0.1.0",
    source="live",
    model=ModelRow("gpt2", 124_439_808, "catalogue"),
    gpu=GpuRow("h200-141g", 150_109_880_320, 149_000_000_000, 1_109_880_320),
    config=StepConfig("bf16", 1, 1024, 1, "none", "sdpa", 1, "none"),
    optimizer="adamw",
    implementation="fused",
    options={"betas": [0.9, 0.999]},
    bytes=ResidentBytes(248_879_616, 248_879_616, 0, 497_759_824),
    state_tensors={"exp_avg": 248_879_616, "exp_avg_sq": 248_879_616, "step": 592},
    phases={"forward": PhasePeak(1_500_000_000)},
    peak_allocated_bytes=1_500_000_000,
    environment=Environment(python="3.12", optplan="0.1.0", command="optplan profile", date="2026-11-22T00:00:00Z"),
    history=pack(HISTORY),
)


def test_a_history_survives_packing() -> None:
    assert unpack(pack(HISTORY)) == HISTORY


def test_a_saved_measurement_reads_back_equal(tmp_path: Path) -> None:
    path = save_record(RECORD, tmp_path / "step.json.gz")
    assert load_record(path) == RECORD
    assert [file.name for file in tmp_path.iterdir()] == ["step.json.gz"]


def test_what_json_prints_reads_back_equal(tmp_path: Path) -> None:
    report = estimate("gpt2", gpu="a100-40g", optimizer="adamw")
    path = tmp_path / "estimate.json"
    path.write_text(json.dumps(msgspec.to_builtins(report), indent=2))
    assert load_record(path) == report


def test_equal_records_are_equal_files(tmp_path: Path) -> None:
    one, two = save_record(RECORD, tmp_path / "one"), save_record(RECORD, tmp_path / "two")
    assert one.read_bytes() == two.read_bytes()


def test_fields_of_a_later_version_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "later.json"
    path.write_text(json.dumps(msgspec.to_builtins(RECORD) | {"colour": "green"}))
    assert load_record(path) == RECORD


def _with_schema(schema: object) -> bytes:
    return json.dumps(msgspec.to_builtins(RECORD) | {"schema": schema}).encode()


def _without_bytes() -> bytes:
    fields = msgspec.to_builtins(RECORD)
    del fields["bytes"]["gradients"]
    return json.dumps(fields).encode()


WHOLE = gzip.compress(json.dumps(msgspec.to_builtins(RECORD)).encode(), mtime=0)
KNOWN = "optplan.estimate/1, optplan.measurement/1"
REFUSED = [
    (b"", "is not a record: it is no JSON document, or was cut short"),
    (b'{"schema": "optplan.est', "is not a record: it is no JSON document, or was cut short"),
    (b"[" * 100_000, "is not a record: it is no JSON document, or was cut short"),
    (WHOLE[: len(WHOLE) // 2], "was cut short: its compressed content has no end"),
    (WHOLE[:40] + b"\xff" * 60 + WHOLE[100:], "is damaged: its compressed content cannot be unpacked"),
    (b"[1, 2]", f"is not a record of optplan: it names no schema; known: {KNOWN}"),
    (_with_schema(None), f"is not a record of optplan: it names no schema; known: {KNOWN}"),
    (
        _with_schema("optplan.measurement/2"),
        f"was made by a newer optplan: schema 'optplan.measurement/2'; this version reads {KNOWN}",
    ),
    (
        _with_schema("optplan.sweep/2"),
        "was made by a newer optplan: schema 'optplan.sweep/2'; this version reads optplan.sweep/1",
    ),
    (_with_schema("torch/1"), f"has schema 'torch/1', which cannot be read here; known: {KNOWN}"),
    (
        _without_bytes(),
        "is a damaged optplan.measurement/1 record: Object missing required field `gradients` - at `$.bytes`",
    ),
]


@pytest.mark.parametrize(("content", "complaint"), REFUSED)
def test_what_is_no_record_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("record").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_record("record")
    assert str(caught.value) == f"'record' {complaint}"


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^cannot read 'none\.json': No such file or directory$"):
        load_record("none.json")
    with pytest.raises(ConfigError, match=r"^cannot read '\.': Is a directory$"):
        load_record(".")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"bytes": [1]}, "damaged timeline: its columns have 1, 4 entries; allowed: one length for all"),
        ({"name": [7, 0, 0, 0]}, "damaged timeline: an event refers to a name, phase or category that is not there"),
        ({"ids": [2, -2, -2, -1]}, "damaged timeline: allocation 2 is made or ended twice"),
        ({"ids": [1, -2, 3, -1]}, "damaged timeline: allocation 1 is made or ended twice"),
    ],
)
def test_a_damaged_timeline_is_refused(change: dict[str, list[int]], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        unpack(msgspec.structs.replace(pack(HISTORY), **change))
    assert str(caught.value) == sentence


def test_a_record_that_does_not_fit_on_the_disk_leaves_the_old_one(tmp_path: Path) -> None:
    path = save_record(RECORD, tmp_path / "step.json.gz")
    before = path.read_bytes()
    larger = msgspec.structs.replace(RECORD, losses=[index / 7 for index in range(50_000)])
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OptplanError) as caught:
            save_record(larger, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert str(caught.value).endswith("File too large; nothing was saved")
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["step.json.gz"]


def test_a_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for write in (check_target, lambda path: save_record(RECORD, path)):
        with pytest.raises(
            OptplanError, match=r"^cannot write 'none/step': No such file or directory; nothing was saved$"
        ):
            write("none/step")
    with pytest.raises(OptplanError, match=r"^cannot write '\.': it is a folder; nothing was saved$"):
        check_target(".")


def _timed(host_launch_seconds: float) -> Measurement:
    time = StepTime(step_seconds=0.5, phases={"step": 0.1}, num_steps=8, host_launch_seconds=host_launch_seconds)
    return msgspec.structs.replace(RECORD, time=time)


@pytest.mark.parametrize("seconds", [0.0, -2e-5, 1e308])
def test_a_host_time_that_cannot_be_is_left_out_and_the_rest_is_read(seconds: float, tmp_path: Path) -> None:
    record = load_record(save_record(_timed(seconds), tmp_path / "step.json.gz"))
    assert isinstance(record, Measurement) and record.time is not None
    assert (record.time.host_launch_seconds, record.time.step_seconds) == (None, 0.5)
    assert record.notes == [
        f"how fast the host launched is not measured: {seconds:g} seconds cannot be the time of one operation"
    ]


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_number_is_no_record(word: str, tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    text = gzip.decompress(save_record(_timed(2e-5), tmp_path / "step.json.gz").read_bytes()).decode()
    path.write_text(text.replace("2e-05", word))
    with pytest.raises(ConfigError, match=r" is not a record: it is no JSON document, or was cut short$"):
        load_record(path)
