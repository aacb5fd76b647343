"""Reading snapshots of anyone: plain data in, one sentence for anything else, and nothing of it executed."""

import gzip
import json
import pickle
from pathlib import Path

import pytest

from optplan.planner.allocator.settings import AllocatorSettings
from optplan.planner.errors import ConfigError
from optplan.planner.history.events import HeldBlock, HistoryEvent
from optplan.planner.history.reader import read_history
from optplan.planner.units import MIB

RECORDED = Path(__file__).parents[2] / "records" / "h200_histories" / "streams_expandable.json.gz"
SEGMENT = {
    "device": 0,
    "address": 4096,
    "total_size": 2 * MIB,
    "stream": 7,
    "segment_type": "small",
    "is_expandable": False,
    "segment_pool_id": (0, 0),
    "blocks": [
        {"address": 4096, "size": 512, "requested_size": 100, "state": "active_allocated"},
        {"address": 4608, "size": 512, "requested_size": 200, "state": "active_awaiting_free"},
        {"address": 5120, "size": 2 * MIB - 1024, "requested_size": 0, "state": "inactive"},
    ],
}
ALLOC = {"action": "alloc", "addr": 4096, "size": 100, "stream": 7, "time_us": 5, "frames": []}
SNAPSHOT = {
    "segments": [SEGMENT],
    "device_traces": [[], [ALLOC, {"action": "oom", "size": 1024, "stream": 7, "device_free": 99}]],
    "allocator_settings": {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:32", "max_split_size": 32 * MIB},
}


def write(tmp_path, data):
    path = tmp_path / "snapshot"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "form",
    [
        pickle.dumps,
        lambda value: pickle.dumps(value, protocol=2),
        lambda value: gzip.compress(pickle.dumps(value)),
        lambda value: json.dumps(value).encode(),
        lambda value: gzip.compress(json.dumps({"name": "a record of ours", "snapshot": value}).encode()),
    ],
)
def test_a_snapshot_is_read_in_every_form(tmp_path, form):
    history = read_history(write(tmp_path, form(SNAPSHOT)))
    assert history.device == 1
    assert history.events == [
        HistoryEvent("alloc", 4096, 100, 7, (0, 0), 0),
        HistoryEvent("oom", 0, 1024, 7, (0, 0), 99),
    ]
    assert history.segments == []
    assert history.settings == AllocatorSettings(max_split_bytes=32 * MIB)
    assert history.alloc_conf == "max_split_size_mb:32"


def test_segments_hold_the_blocks_in_use(tmp_path):
    snapshot = {**SNAPSHOT, "device_traces": [[ALLOC]]}
    (segment,) = read_history(write(tmp_path, pickle.dumps(snapshot))).segments
    assert (segment.address, segment.size, segment.stream, segment.small) == (4096, 2 * MIB, 7, True)
    assert (segment.allocated, segment.active) == (512, 1024)
    assert segment.blocks == (HeldBlock(4096, 512, 100, False), HeldBlock(4608, 512, 200, True))


def test_blocks_of_older_snapshots_have_no_addresses_and_no_pools(tmp_path):
    blocks = [{key: block[key] for key in ("size", "state")} for block in SEGMENT["blocks"]]
    blocks[1]["state"] = "active_pending_free"
    segment = {key: SEGMENT[key] for key in ("device", "address", "total_size", "stream", "segment_type")}
    snapshot = {"segments": [{**segment, "blocks": blocks}], "device_traces": [[ALLOC]]}
    history = read_history(write(tmp_path, pickle.dumps(snapshot)))
    assert history.segments[0].blocks == (HeldBlock(4096, 512, 512, False), HeldBlock(4608, 512, 512, True))
    assert history.alloc_conf is None


def test_a_recorded_pickle_reads_as_its_json(tmp_path):
    record = json.loads(gzip.decompress(RECORDED.read_bytes()))
    path = write(tmp_path, pickle.dumps(record["snapshot"]))
    assert read_history(path).events == read_history(RECORDED).events
    assert read_history(path).segments == read_history(RECORDED).segments


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"last_allocator_settings": "expandable_segments:True"}, AllocatorSettings(expandable_segments=True)),
        # A text that only another torch can read: what stands beside it counts.
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "novelty:1", "max_split_size": 64 * MIB, "garbage_collection_threshold": 0.5},
            AllocatorSettings(max_split_bytes=64 * MIB, garbage_collection_threshold=0.5),
        ),
        (
            {
                "PYTORCH_CUDA_ALLOC_CONF": "novelty:1",
                "max_split_size": -1,
                "roundup_power2_divisions": {str(2**index): 4 for index in range(16)},
            },
            AllocatorSettings(roundup_power2_divisions=(4,) * 16),
        ),
        (None, AllocatorSettings()),
    ],
)
def test_settings_come_from_the_snapshot(tmp_path, settings, expected):
    snapshot = {**SNAPSHOT, "allocator_settings": settings}
    assert read_history(write(tmp_path, pickle.dumps(snapshot))).settings == expected


class Evil:
    ran = False

    def __reduce__(self):
        return (setattr, (Evil, "ran", True))


class Persistent(pickle.Pickler):
    def persistent_id(self, obj):
        return "weights" if obj == 42 else None


def persistent_pickle(tmp_path):
    with (tmp_path / "persistent").open("wb") as file:
        Persistent(file).dump({"device_traces": 42})
    return (tmp_path / "persistent").read_bytes()


def with_event(**changes):
    return pickle.dumps({**SNAPSHOT, "device_traces": [[{**ALLOC, **changes}]]})


def with_segment(**changes):
    return pickle.dumps({"device_traces": [[ALLOC]], "segments": [{**SEGMENT, **changes}]})


WHOLE = pickle.dumps(SNAPSHOT)
PACKED = gzip.compress(WHOLE)
REFUSED = {
    "code": (
        lambda _: pickle.dumps({"device_traces": [Evil()]}),
        "{path} asks for 'builtins.setattr', which no snapshot needs: nothing of it was run",
    ),
    "class": (
        lambda _: pickle.dumps({"device_traces": Path("x")}),
        "asks for",
    ),
    "reference": (persistent_pickle, "{path} refers to 'weights' outside of the file, which no snapshot does"),
    "empty": (lambda _: b" \n", "{path} is empty; a snapshot is written by torch.cuda.memory._dump_snapshot"),
    "short pickle": (lambda _: WHOLE[: len(WHOLE) // 2], "{path} is truncated: the pickle does not end"),
    "short json": (lambda _: b'{"device_traces": [', "{path} is truncated: the JSON text does not end"),
    "short gzip": (
        lambda _: PACKED[: len(PACKED) // 2],
        "{path} is truncated or damaged: its compressed data does not end",
    ),
    "damaged pickle": (lambda _: b"\x80\x04}]a.", "{path} is not a pickle of plain data"),
    "archive": (
        lambda _: b"PK\x03\x04rest",
        "{path} is a zip archive, such as torch.save writes; give the snapshot itself",
    ),
    "text": (
        lambda _: b"hello",
        "{path} is neither a pickle nor JSON; give a file of torch.cuda.memory._dump_snapshot",
    ),
    "deep": (
        lambda _: b"[" * 100_000,
        "{path} is neither a pickle nor JSON; give a file of torch.cuda.memory._dump_snapshot",
    ),
    "list": (
        lambda _: pickle.dumps([SEGMENT]),
        "{path} is no snapshot with a history (segments and device_traces), got a list; write one with"
        " torch.cuda.memory._dump_snapshot",
    ),
    "number": (
        lambda _: b"5",
        "{path} is no snapshot with a history (segments and device_traces), got 5; write one with"
        " torch.cuda.memory._dump_snapshot",
    ),
    "no history": (
        lambda _: pickle.dumps({"segments": [], "device_traces": [[]]}),
        "{path} holds no history: call torch.cuda.memory._record_memory_history() before what is to be recorded",
    ),
    "no segments": (
        lambda _: pickle.dumps({"device_traces": [[ALLOC]]}),
        "segments in {path} must be a list, got None",
    ),
    "trace": (
        lambda _: pickle.dumps({**SNAPSHOT, "device_traces": 3}),
        "device_traces in {path} must be a list, got 3",
    ),
    "entry": (
        lambda _: pickle.dumps({**SNAPSHOT, "device_traces": [["alloc"]]}),
        "a trace entry in {path} must be an object, got 'alloc'",
    ),
    "action": (
        lambda _: with_event(action="segment_teleport"),
        "action 'segment_teleport' in {path} is unknown, perhaps of a newer torch; known: alloc, free_requested,"
        " free_completed, segment_alloc, segment_free, segment_map, segment_unmap, snapshot, oom",
    ),
    "no action": (
        lambda _: with_event(action=None),
        "action None in {path} is unknown, perhaps of a newer torch; known: alloc, free_requested, free_completed,"
        " segment_alloc, segment_free, segment_map, segment_unmap, snapshot, oom",
    ),
    "size": (lambda _: with_event(size=-1), "size in {path} must be an integer from 0 on, got -1"),
    "boolean": (lambda _: with_event(size=True), "size in {path} must be an integer from 0 on, got True"),
    "huge": (
        lambda _: with_event(addr=2**63),
        "addr in {path} must be an integer from 0 on, got 9223372036854775808",
    ),
    "pool": (lambda _: with_event(pool_id=[1]), "pool_id in {path} must be two integers, got [1]"),
    "kind": (
        lambda _: with_segment(segment_type="medium"),
        "segment_type in {path} must be small or large, got 'medium'",
    ),
    "state": (
        lambda _: with_segment(blocks=[{"size": 512, "state": "gone"}]),
        "state 'gone' in {path} is unknown; known: active_allocated, active_awaiting_free, active_pending_free,"
        " inactive",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_snapshot_is_refused_in_one_sentence(tmp_path, case):
    make, sentence = REFUSED[case]
    path = write(tmp_path, make(tmp_path))
    with pytest.raises(ConfigError) as error:
        read_history(path)
    if case == "class":
        assert str(error.value).endswith("which no snapshot needs: nothing of it was run")
    else:
        assert str(error.value) == sentence.format(path=f"'{path}'")
    assert not Evil.ran


@pytest.mark.parametrize(
    ("name", "sentence"), [("missing", "there is no file '{path}'"), ("", "'{path}' is not a regular file")]
)
def test_there_must_be_a_file(tmp_path, name, sentence):
    path = tmp_path / name
    with pytest.raises(ConfigError) as error:
        read_history(path)
    assert str(error.value) == sentence.format(path=path)


def test_a_device_without_a_history_is_refused(tmp_path):
    path = write(tmp_path, WHOLE)
    with pytest.raises(ConfigError) as error:
        read_history(path, device=0)
    assert str(error.value) == f"'{path}' holds no history of device 0; recorded: 1"


def test_every_cut_of_a_pickle_is_refused_or_read(tmp_path):
    for length in range(1, len(WHOLE), 7):
        path = write(tmp_path, WHOLE[:length])
        with pytest.raises(ConfigError):
            read_history(path)


def test_flipped_bytes_never_escape_as_another_error(tmp_path):
    for position in range(0, len(WHOLE), 3):
        data = bytearray(WHOLE)
        data[position] ^= 0x5A
        path = write(tmp_path, bytes(data))
        try:
            read_history(path)
        except ConfigError as error:
            assert "\n" not in str(error)
