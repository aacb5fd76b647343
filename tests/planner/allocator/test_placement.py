"""Where segments are put, against the addresses that a driver gave on an H200."""

import gzip
import json
from contextlib import suppress
from pathlib import Path

import pytest

from optplan.planner.allocator.device import DeviceAllocator, OutOfMemory
from optplan.planner.allocator.driver import Driver
from optplan.planner.allocator.placement import SegmentPlacement
from optplan.planner.allocator.settings import parse_alloc_conf

HISTORIES = Path(__file__).parents[2] / "records" / "h200_histories"
MIB = 2**20
TOP = 2**60
NUM_SEGMENTS = {
    "full": 30,
    "garbage_collection": 43,
    "large_segments": 45,
    "max_split": 104,
    "plain": 37,
    "plain_small": 29,
    "roundup_list": 35,
    "roundup_number": 57,
}
"""Segments of the processes with one stream and without a kernel, in all 380."""


def read(name):
    return json.loads(gzip.decompress((HISTORIES / f"{name}.json.gz").read_bytes()))


def moves_of(name):
    """What changed hands, with the addresses as recorded."""
    entries = read(name)["snapshot"]["device_traces"][0]
    return [(e["action"], e["addr"], e["size"]) for e in entries if e["action"] in ("segment_alloc", "segment_free")]


def placed(moves):
    """The recorded and the simulated address of every segment; the first recorded one says where memory begins."""
    placement, ours, pairs, offset = SegmentPlacement(), {}, [], None
    for action, address, size in moves:
        if action == "segment_free":
            placement.give_back(ours.pop(address), size)
            continue
        ours[address] = placement.place(size)
        offset = address - ours[address] if offset is None else offset
        pairs.append((address, ours[address] + offset))
    return pairs


@pytest.mark.parametrize(("name", "num_segments"), NUM_SEGMENTS.items())
def test_segments_lie_where_the_driver_put_them(name, num_segments):
    pairs = placed(moves_of(name))
    assert len(pairs) == num_segments
    assert [ours for _, ours in pairs] == [recorded for recorded, _ in pairs]


def addresses_of(record, driver):
    """The address of each allocation when an allocator on that driver is told the operations alone; None without."""
    settings = parse_alloc_conf(record["alloc_conf"])
    allocator = DeviceAllocator(settings, allowed_bytes=record["allowed_bytes"], driver=driver)
    tensors = {}
    for kind, *rest in record["operations"]:
        if kind == "empty":
            allocator.empty_cache()
        elif kind == "free":
            allocator.free(tensors.pop(rest[0], None))
        elif kind == "alloc":
            with suppress(OutOfMemory):
                tensors[rest[0]] = allocator.alloc(rest[1])
            yield tensors[rest[0]].address if rest[0] in tensors else None


@pytest.mark.parametrize("name", NUM_SEGMENTS)
def test_from_the_operations_alone_every_block_lies_where_it_did(name):
    record = read(name)
    ours = list(addresses_of(record, Driver(segment_addresses="placed")))
    steps = zip(record["operations"], record["addresses"], strict=True)
    recorded = [address or None for (kind, *_), address in steps if kind == "alloc"]
    shifts = {
        there - here for here, there in zip(ours, recorded, strict=True) if here is not None and there is not None
    }
    assert len(shifts) == 1
    assert [here is None for here in ours] == [there is None for there in recorded]


def test_the_first_kernels_of_a_training_run_take_memory_of_their_own():
    pairs = placed(moves_of("training"))
    agree = [ours == recorded for recorded, ours in pairs]
    assert agree[:8] == [True] * 8  # the model's parameters
    assert agree[8] is False


@pytest.mark.parametrize(
    ("sizes", "offsets"),
    [
        ((2, 2, 20), (414, 488, 490)),  # the newer of the context's gaps first
        ((70, 2, 2, 26), (-96, -26, -24, -32 - 96)),
        ((112, 112, 16, 16), (-128, -256, -144, -16)),  # the newest chunk's rest, then the one before
    ],
)
def test_the_newest_chunk_with_room_is_taken(sizes, offsets):
    placement = SegmentPlacement()
    assert [(placement.place(size * MIB) - TOP) // MIB for size in sizes] == list(offsets)


def test_addresses_given_up_are_for_smaller_chunks():
    placement = SegmentPlacement()
    first, second, third = (placement.place(96 * MIB) for _ in range(3))
    placement.give_back(second, 96 * MIB)
    assert placement.place(96 * MIB) == third - 96 * MIB
    assert placement.place(64 * MIB) == first - 64 * MIB


def test_the_lowest_addresses_come_again():
    placement = SegmentPlacement()
    placement.place(96 * MIB)
    second = placement.place(96 * MIB)
    placement.give_back(second, 96 * MIB)
    assert placement.place(96 * MIB) == second


def test_a_copy_goes_its_own_way():
    placement = SegmentPlacement()
    first = placement.place(40 * MIB)
    copy = placement.copy()
    copy.give_back(first, 40 * MIB)
    assert placement.place(24 * MIB) == first + 40 * MIB
    assert copy.place(40 * MIB) == first


def test_a_segment_from_elsewhere_is_left_alone():
    placement = SegmentPlacement()
    placement.give_back(123 * MIB, 20 * MIB)
    assert placement.place(40 * MIB) == TOP - 64 * MIB


def test_a_driver_places_and_takes_back():
    driver = Driver(segment_addresses="placed")
    address = driver.segment_address(70 * MIB)
    driver.give("segment_alloc", address, 70 * MIB)
    other = driver.copy()
    driver.take_back("segment_free", address, 70 * MIB)
    assert driver.segment_address(70 * MIB) == address == TOP - 96 * MIB
    assert other.segment_address(26 * MIB) == address + 70 * MIB
