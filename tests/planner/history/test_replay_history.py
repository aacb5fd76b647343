"""Histories recorded on an H200, replayed: from their start, from anywhere within, and under settings not their own."""

import gzip
import json
import time
from functools import cache
from pathlib import Path

import msgspec
import pytest

from optplan.planner.errors import ConfigError
from optplan.planner.history.events import DeviceHistory
from optplan.planner.history.limits import find_limits
from optplan.planner.history.reader import parse_history
from optplan.planner.history.recorded import RecordedReplay
from optplan.planner.history.replay import replay_history
from optplan.planner.history.start import start_state
from optplan.planner.units import GIB, MIB

HISTORIES = Path(__file__).parents[2] / "records" / "h200_histories"
NAMES = sorted(path.name.removesuffix(".json.gz") for path in HISTORIES.glob("*.json.gz"))
PEAKS = ("peak_allocated_bytes", "peak_requested_bytes", "peak_active_bytes", "peak_reserved_bytes")


def path_of(name):
    return HISTORIES / f"{name}.json.gz"


@cache
def record_of(name):
    return json.loads(gzip.decompress(path_of(name).read_bytes()))


@cache
def report_of(name, **options):
    return replay_history(path_of(name), **options)


@pytest.mark.parametrize("name", NAMES)
def test_a_replay_is_the_recording_with_all_its_counters(name):
    report, stats = report_of(name), record_of(name)["final_stats"]
    agreement, replay = report.agreement, report.replay
    assert (agreement.first_difference, agreement.is_whole) == (None, True)
    assert agreement.num_equal_addresses == agreement.num_allocations == report.history.num_allocations > 0
    assert agreement.num_equal_moves == agreement.num_moves > 0
    assert {peak: getattr(replay, peak) for peak in PEAKS} == {
        f"peak_{kind}_bytes": stats[f"{kind}_bytes.all.peak"]
        for kind in ("allocated", "requested", "active", "reserved")
    }
    assert replay.num_alloc_retries == stats["num_alloc_retries"]
    assert report.history.num_ooms == stats["num_ooms"]


def cut(history, at):
    """The history from a later entry on, never between a request and what the allocator did for it."""
    while history.events[at - 1].action.startswith("segment_") or history.events[at].action == "free_completed":
        at += 1
    return msgspec.structs.replace(history, events=history.events[at:])


def rest_of(name, at):
    history = cut(parse_history(record_of(name), where=name), at)
    start = start_state(history)
    replay = RecordedReplay(history, start, find_limits(history, start_reserved_bytes=start.reserved_bytes))
    replay.run()
    return replay, start


# On the device that was full an expandable range without memory was made for a request that failed: it leaves no trace.
CUTS = [
    (name, at)
    for name in NAMES
    for at in (100, 301, 440, 800, 1200, 1700)
    if name != "device_full_expandable" and at < 0.6 * len(record_of(name)["snapshot"]["device_traces"][0])
]


@pytest.mark.parametrize(("name", "at"), CUTS)
def test_a_recording_that_begins_in_the_middle_is_replayed_from_the_state_it_found(name, at):
    replay, start = rest_of(name, at)
    assert start.segments
    assert start.blocks
    assert replay.first_difference is None
    assert replay.num_equal_addresses == replay.num_allocations > 0


@pytest.mark.parametrize(
    ("recorded", "other", "alloc_conf"), [("training", "training_expandable", "expandable_segments:True")]
)
def test_what_other_settings_would_have_given_is_what_they_gave(recorded, other, alloc_conf):
    stats, what_if = record_of(other)["final_stats"], report_of(recorded, alloc_conf=alloc_conf).what_if
    assert {peak: getattr(what_if, peak) for peak in PEAKS} == {
        f"peak_{kind}_bytes": stats[f"{kind}_bytes.all.peak"]
        for kind in ("allocated", "requested", "active", "reserved")
    }
    assert what_if.final.reserved_bytes == stats["reserved_bytes.all.current"]
    assert what_if.out_of_memory is None


def test_on_a_device_as_small_the_other_recording_s_request_fails():
    """The same program once with room and once without, under other settings: the same allocation ends both."""
    full = record_of("training_full")
    what_if = report_of("training", alloc_conf=full["alloc_conf"], memory=full["allowed_bytes"]).what_if
    entries = full["snapshot"]["device_traces"][0]
    before = [entry["action"] for entry in entries].index("oom")
    num_allocations = sum(entry["action"] == "alloc" for entry in entries[:before])
    failure = what_if.out_of_memory
    assert (failure.allocation, failure.requested_bytes) == (num_allocations, entries[before]["size"])
    assert what_if.num_alloc_retries == full["final_stats"]["num_alloc_retries"]
    assert what_if.peak_reserved_bytes == full["final_stats"]["reserved_bytes.all.peak"]


UNLIMITED = ["plain", "expandable", "max_split", "roundup_list", "streams", "streams_expandable", "training"]


@pytest.mark.parametrize("name", UNLIMITED)
def test_a_device_with_room_changes_nothing(name):
    report = report_of(name, memory=200 * GIB)
    assert {**msgspec.to_builtins(report.replay), "memory_bytes": 200 * GIB} == msgspec.to_builtins(report.what_if)


@pytest.mark.parametrize("name", UNLIMITED)
def test_one_byte_less_than_was_reserved_is_felt_and_what_was_allocated_is_needed(name):
    replay = report_of(name).replay
    tight = report_of(name, memory=replay.peak_reserved_bytes - 1).what_if
    assert tight.peak_reserved_bytes < replay.peak_reserved_bytes
    failure = report_of(name, memory=replay.peak_requested_bytes - 1).what_if.out_of_memory
    assert failure is not None
    assert failure.reserved_bytes >= failure.allocated_bytes > 0


def test_a_share_of_the_device_collects_garbage():
    report = report_of(
        "plain", alloc_conf="garbage_collection_threshold:0.5,per_process_memory_fraction:0.8", memory=2 * GIB
    )
    assert report.notes == []
    assert report.what_if.num_alloc_retries == 0
    assert report.what_if.peak_reserved_bytes < report.replay.peak_reserved_bytes


@pytest.mark.parametrize(
    ("options", "notes"),
    [
        (
            {"alloc_conf": "garbage_collection_threshold:0.6"},
            [
                "garbage_collection_threshold has no effect without a share of the device: add --memory and"
                " per_process_memory_fraction below 1"
            ],
        ),
        (
            {"alloc_conf": "per_process_memory_fraction:0.5"},
            ["per_process_memory_fraction has no effect without --memory"],
        ),
        (
            {"alloc_conf": "pinned_use_background_threads:True"},
            ["pinned_use_background_threads has no effect on the memory simulated here"],
        ),
    ],
)
def test_settings_without_effect_are_named(options, notes):
    assert report_of("plain", **options).notes == notes


def events_of(*rows):
    return [{"action": action, "addr": address, "size": size, "stream": 0} for action, address, size in rows]


def snapshot_of(events, *blocks, size=20 * MIB):
    segment = {"address": 0, "total_size": size, "segment_type": "large", "stream": 0, "device": 0}
    held = [
        {"address": address, "size": num_bytes, "requested_size": num_bytes, "state": state}
        for address, num_bytes, state in blocks
    ]
    return {"segments": [{**segment, "blocks": held}], "device_traces": [events]}


def start_of(snapshot) -> DeviceHistory:
    return start_state(parse_history(snapshot, where="here"))


def test_a_block_s_hidden_rest_is_learnt_from_the_first_allocation_above_it():
    # Freed within the recording, so that only its request is known; 3.5 MiB begins where it ended.
    snapshot = snapshot_of(
        events_of(
            ("alloc", 3 * MIB + MIB // 2, 4 * MIB), ("free_requested", 0, 3 * MIB), ("free_completed", 0, 3 * MIB)
        ),
        (0, 3 * MIB + MIB // 2, "inactive"),
        (3 * MIB + MIB // 2, 4 * MIB, "active_allocated"),
        (7 * MIB + MIB // 2, 12 * MIB + MIB // 2, "inactive"),
    )
    assert start_of(snapshot).blocks[0].size == 3 * MIB + MIB // 2


@pytest.mark.parametrize(
    ("events", "sentence"),
    [
        (
            [("alloc", 8 * MIB, 4 * MIB)],
            "here contradicts itself: alloc of 4194304 bytes at 0x800000 does not lead to its segments; record all"
            " actions and dump the snapshot before the recording is stopped",
        ),
        (
            [("segment_alloc", 64 * MIB, 20 * MIB)],
            "here contradicts itself: segment_alloc of 20971520 bytes at 0x4000000 does not lead to its segments;"
            " record all actions and dump the snapshot before the recording is stopped",
        ),
        (
            [("segment_map", 64 * MIB, 20 * MIB)],
            "here contradicts itself: segment_map of 20971520 bytes at 0x4000000 does not lead to its segments; record"
            " all actions and dump the snapshot before the recording is stopped",
        ),
        (
            [("free_completed", MIB, 4 * MIB)],
            "here contradicts itself: blocks overlap at 0x0 when it begins",
        ),
        (
            [("free_completed", 640 * MIB, 4 * MIB)],
            "here contradicts itself: blocks lie outside of its segments when it begins",
        ),
    ],
)
def test_a_history_that_cannot_have_led_to_its_segments_is_refused(tmp_path, events, sentence):
    snapshot = snapshot_of(events_of(*events), (0, 4 * MIB, "active_allocated"), (4 * MIB, 16 * MIB, "inactive"))
    path = tmp_path / "here"
    path.write_text(json.dumps(snapshot))
    with pytest.raises(ConfigError) as error:
        replay_history(path)
    assert str(error.value).replace(f"'{path}'", "here") == sentence


def test_a_history_of_tens_of_thousands_of_events_takes_a_fraction_of_a_second(tmp_path):
    record = record_of("training")
    events = parse_history(record, where="here").events
    history = parse_history(record, where="here")
    start = start_state(history)
    best = 1.0
    for _ in range(3):
        begun = time.process_time()
        RecordedReplay(history, start, find_limits(history, start_reserved_bytes=0)).run()
        best = min(best, time.process_time() - begun)
    # 0.15 s for 30 000 events is 5 µs each; twice that is allowed for a slow machine.
    assert best / len(events) < 10e-6
