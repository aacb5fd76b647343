"""The full simulator against histories recorded on an H200: every address and every counter after every operation."""

import gzip
import json
from collections import deque
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest

from optplan.planner.allocator.device import DeviceAllocator, OutOfMemory
from optplan.planner.allocator.driver import Driver, SegmentEvent
from optplan.planner.allocator.settings import parse_alloc_conf
from optplan.planner.history.addresses import RecordedAddresses
from optplan.planner.history.reader import parse_history

HISTORIES = Path(__file__).parents[2] / "records" / "h200_histories"
NAMES = sorted(path.name.removesuffix(".json.gz") for path in HISTORIES.glob("*.json.gz"))
PATTERNS = [name for name in NAMES if not name.startswith("training")]
FIELDS = {
    "allocation": "num_allocated",
    "active": "num_active",
    "segment": "num_segments",
    "inactive_split": "num_inactive_split",
}


@cache
def read(name):
    return json.loads(gzip.decompress((HISTORIES / f"{name}.json.gz").read_bytes()))


class Recording:
    """A recorded trace, taken up operation by operation."""

    def __init__(self, record):
        self.entries = deque(record["snapshot"]["device_traces"][0])
        self.addresses = RecordedAddresses(parse_history(record, where="record").events)

    def up_to(self, *actions):
        taken = []
        while not taken or taken[-1]["action"] not in actions:
            taken.append(self.entries.popleft())
        return taken


def moves_of(entries):
    return [SegmentEvent(e["action"], e["addr"], e["size"]) for e in entries if e["action"].startswith("segment_")]


def counters_of(allocator):
    names = ("allocated_bytes", "requested_bytes", "active_bytes", "reserved_bytes", "inactive_split_bytes", *FIELDS)
    counters = {
        f"{name}.{pool}": getattr(getattr(allocator, pool.removesuffix("_pool")), FIELDS.get(name, name))
        for name in names
        for pool in ("small_pool", "large_pool")
    }
    return counters | {"num_alloc_retries": allocator.num_alloc_retries, "num_ooms": allocator.num_ooms}


def capacity_of(record):
    """What the device could give when it first refused: what was reserved then, and what it said was free."""
    if record["allowed_bytes"] is not None:
        return None
    reserved = 0
    for entry in record["snapshot"]["device_traces"][0]:
        if entry["action"] in ("segment_alloc", "segment_map"):
            reserved += entry["size"]
        elif entry["action"] in ("segment_free", "segment_unmap"):
            reserved -= entry["size"]
        elif entry["action"] == "oom":
            return reserved + entry["device_free"]
    return None


class Player:
    """Runs a recorded pattern's operations through the simulator."""

    def __init__(self, record):
        self.recording = Recording(record)
        self.driver = Driver(
            capacity_bytes=capacity_of(record), total_bytes=record["total_bytes"], addresses=self.recording.addresses
        )
        settings = parse_alloc_conf(record["alloc_conf"])
        self.allocator = DeviceAllocator(settings, allowed_bytes=record["allowed_bytes"], driver=self.driver)
        self.streams = record["streams"]
        self.tensors, self.used, self.waiting = {}, {}, {}

    def run(self, kind, *rest, retried):
        """Run one operation and return the address that it leads to; `retried` if the device was full."""
        self.retried = retried
        return getattr(self, kind)(*rest)

    def alloc(self, slot, num_bytes, stream):
        entries = self.recording.up_to("alloc", "oom")
        for entry in entries:
            if entry["action"] == "free_completed":
                block = self.waiting.pop(entry["addr"])
                # On a full device the allocator itself waits for the other streams, after it has searched in vain.
                if not self.retried:
                    self.allocator.finish(block)
        del self.driver.events[:]
        block = None
        with suppress(OutOfMemory):
            block = self.tensors[slot] = self.allocator.alloc(num_bytes, stream=self.streams[stream])
        self.compare_moves(entries)
        return 0 if block is None else block.address

    def free(self, slot):
        block = self.tensors.pop(slot, None)
        if block is None:
            return 0
        self.recording.up_to("free_requested")
        if self.used.get(slot, block.pool.stream) != block.pool.stream:
            self.allocator.free_when_done(block)
            self.waiting[block.address] = block
        else:
            self.recording.up_to("free_completed")
            self.allocator.free(block)
        return 0

    def use(self, slot, stream):
        if slot in self.tensors and self.streams[stream] != self.tensors[slot].pool.stream:
            self.used[slot] = self.streams[stream]
        return 0

    def sync(self):
        return 0

    def empty(self):
        del self.driver.events[:]
        self.allocator.empty_cache()
        entries = [self.recording.entries.popleft() for _ in range(len(self.waiting) + len(self.driver.events))]
        self.waiting.clear()
        self.compare_moves(entries)
        return 0

    def compare_moves(self, entries):
        moves = moves_of(entries)
        assert self.driver.events == moves
        for move in moves:
            self.recording.addresses.passed(move)


@pytest.mark.parametrize("name", PATTERNS)
def test_every_address_and_every_counter_is_the_device_s(name):
    record = read(name)
    player = Player(record)
    expected = dict.fromkeys(counters_of(player.allocator), 0)
    steps = zip(record["operations"], record["addresses"], record["changes"], strict=True)
    for index, (operation, address, changes) in enumerate(steps):
        assert player.run(*operation, retried="num_alloc_retries" in changes) == address, (index, operation)
        expected |= changes
        assert counters_of(player.allocator) == expected, (index, operation)
    assert index > 0
