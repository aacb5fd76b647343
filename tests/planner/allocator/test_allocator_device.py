"""The full simulator's rules one by one; recorded devices judge them together in test_allocator_histories.py."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optplan.planner.allocator.caching import CachingAllocator
from optplan.planner.allocator.choice import make_allocator
from optplan.planner.allocator.copies import copy_allocator
from optplan.planner.allocator.device import DeviceAllocator, OutOfMemory
from optplan.planner.allocator.driver import Driver
from optplan.planner.allocator.pools import DeviceBlock
from optplan.planner.allocator.release import too_old
from optplan.planner.allocator.settings import parse_alloc_conf
from optplan.planner.units import MIB


def make(conf="", *, capacity=None, allowed=None):
    return DeviceAllocator(
        parse_alloc_conf(conf), allowed_bytes=allowed, driver=Driver(capacity_bytes=capacity, total_bytes=2**37)
    )


def test_a_block_at_the_limit_is_not_split_and_serves_no_smaller_request():
    allocator = make("max_split_size_mb:32")
    large = allocator.alloc(40 * MIB)
    allocator.free(large)
    small = allocator.alloc(24 * MIB)
    assert allocator.reserved_bytes == 64 * MIB
    # A request within 20 MiB of it takes the whole of it.
    again = allocator.alloc(33 * MIB)
    assert (again.size, again.address) == (40 * MIB, large.address)
    assert (small.size, allocator.allocated_bytes) == (24 * MIB, 64 * MIB)


def test_a_request_far_below_a_never_split_block_leaves_it():
    allocator = make("max_split_size_mb:32")
    allocator.free(allocator.alloc(60 * MIB))
    allocator.alloc(40 * MIB)
    assert allocator.reserved_bytes == 100 * MIB


def test_on_a_full_device_a_never_split_segment_goes_before_the_rest_of_the_cache():
    allocator = make("max_split_size_mb:32", capacity=120 * MIB)
    for block in [allocator.alloc(24 * MIB), allocator.alloc(60 * MIB)]:
        allocator.free(block)
    allocator.alloc(39 * MIB)
    assert [event.action for event in allocator.driver.events[2:]] == ["segment_free", "segment_alloc"]
    assert allocator.driver.events[2].size == 60 * MIB
    assert (allocator.reserved_bytes, allocator.num_alloc_retries) == (64 * MIB, 0)


def test_a_full_device_gives_back_unsplit_segments_and_tries_again():
    allocator = make(capacity=64 * MIB)
    allocator.alloc(2 * MIB)
    allocator.free(allocator.alloc(30 * MIB))
    allocator.alloc(44 * MIB)
    assert (allocator.num_alloc_retries, allocator.num_ooms) == (1, 0)
    assert allocator.reserved_bytes == 64 * MIB


def test_a_request_beyond_the_device_fails_and_leaves_the_rest_usable():
    allocator = make(capacity=64 * MIB)
    kept = allocator.alloc(30 * MIB)
    with pytest.raises(OutOfMemory, match=r"^out of memory on a request of 41943040 bytes$"):
        allocator.alloc(40 * MIB)
    assert (allocator.num_alloc_retries, allocator.num_ooms) == (1, 1)
    allocator.free(kept)
    assert allocator.alloc(40 * MIB).size == 40 * MIB


def test_blocks_of_one_stream_serve_no_other():
    allocator = make()
    allocator.free(allocator.alloc(20 * MIB, stream=1))
    allocator.alloc(20 * MIB, stream=2)
    assert allocator.reserved_bytes == 40 * MIB
    allocator.alloc(20 * MIB, stream=1)
    assert allocator.reserved_bytes == 40 * MIB


def test_a_block_that_another_stream_still_uses_is_active_and_not_allocated():
    allocator = make()
    block = allocator.alloc(20 * MIB)
    allocator.free_when_done(block)
    statistics = allocator.statistics()
    assert (statistics.allocated_bytes, statistics.active_bytes) == (0, 20 * MIB)
    allocator.alloc(20 * MIB)
    assert allocator.reserved_bytes == 40 * MIB
    allocator.finish(block)
    allocator.finish(block)
    assert allocator.statistics().active_bytes == 20 * MIB


def test_a_full_device_waits_for_other_streams():
    allocator = make(capacity=40 * MIB)
    allocator.free_when_done(allocator.alloc(30 * MIB))
    allocator.alloc(36 * MIB)
    assert allocator.statistics().active_bytes == 36 * MIB


def test_old_segments_are_collected_above_the_threshold_and_young_ones_kept():
    allocator = make("garbage_collection_threshold:0.5", allowed=200 * MIB)
    blocks = [allocator.alloc(size * MIB) for size in (20, 30, 40, 50)]
    allocator.free(blocks[1])
    for _ in range(8):
        allocator.free(allocator.alloc(20 * MIB + 512))  # found in the 30 MiB, whose age it renews
    allocator.free(blocks[2])
    for _ in range(4):
        allocator.free(allocator.alloc(30 * MIB))
    allocator.alloc(32 * MIB - 512)
    assert allocator.reserved_bytes == 140 * MIB
    allocator.alloc(52 * MIB)
    freed = [event.size for event in allocator.driver.events if event.action == "segment_free"]
    assert freed == [30 * MIB]


def test_collecting_stops_when_it_is_enough_to_the_byte():
    pool = make().pool(0, (0, 0), False)
    first, second = DeviceBlock(0, 30 * MIB, pool), DeviceBlock(64 * MIB, 20 * MIB, pool)
    first.since, second.since = 0, 5
    assert too_old([first, second], 30 * MIB, now=6) == [first]
    assert too_old([first, second], 30 * MIB + 1, now=6) == [first, second]


def test_an_expandable_range_grows_by_pages_and_splits_to_the_last_512_bytes():
    allocator = make("expandable_segments:True")
    first = allocator.alloc(11 * MIB)
    assert (first.size, allocator.reserved_bytes) == (11 * MIB, 20 * MIB)
    second = allocator.alloc(30 * MIB)
    assert second.address == first.address + 11 * MIB
    assert allocator.reserved_bytes == 60 * MIB
    allocator.alloc(100)
    assert allocator.reserved_bytes == 62 * MIB
    assert allocator.statistics().inactive_split_bytes == 0


def test_of_an_expandable_range_whole_free_pages_go_back_and_come_again():
    allocator = make("expandable_segments:True")
    first, second = allocator.alloc(50 * MIB), allocator.alloc(5 * MIB)
    allocator.free(first)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 20 * MIB
    again = allocator.alloc(45 * MIB)
    assert (again.address, allocator.reserved_bytes) == (first.address, 80 * MIB - 20 * MIB)
    allocator.free(again)
    allocator.free(second)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0


def test_private_pools_are_apart_and_keep_their_segments():
    allocator = make()
    allocator.free(allocator.alloc(20 * MIB, owner=(0, 1)))
    allocator.alloc(20 * MIB)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 40 * MIB


REQUESTS = st.lists(st.tuples(st.integers(1, 30 * MIB), st.integers(0, 50)), max_size=60)


def run(allocator, requests, live):
    trail = []
    for num_bytes, choice in requests:
        live.append(allocator.alloc(num_bytes))
        if choice % 2:
            allocator.free(live.pop(choice % len(live)))
        trail.append((allocator.allocated_bytes, allocator.requested_bytes, allocator.reserved_bytes))
    return trail


@given(REQUESTS)
def test_under_torch_s_own_settings_it_is_the_lean_simulator(requests):
    assert run(make(), requests, []) == run(CachingAllocator(), requests, [])


@pytest.mark.parametrize(("order", "first"), [("ascending", 0), ("descending", 1)])
def test_of_equal_segments_the_lowest_serves_first(order, first):
    allocator = make_allocator(parse_alloc_conf("max_split_size_mb:64"), segment_addresses=order)
    blocks = [allocator.alloc(16 * MIB) for _ in range(2)]
    for block in blocks:
        allocator.free(block)
    assert allocator.alloc(16 * MIB).address == blocks[first].address


CONFS = ["", "max_split_size_mb:20", "roundup_power2_divisions:4", "expandable_segments:True"]


@given(REQUESTS, REQUESTS, st.sampled_from(CONFS))
def test_a_copy_goes_on_as_the_original_does_and_leaves_it_alone(before, after, conf):
    allocator, live = make(conf), []
    run(allocator, before, live)
    other, twins = copy_allocator(allocator, live)
    twin_live = [twins[block] for block in live]
    state = allocator.statistics()
    trail = run(other, after, twin_live)
    assert allocator.statistics() == state
    assert run(allocator, after, live) == trail
    assert other.statistics() == allocator.statistics()
    assert [block.address for block in twin_live] == [block.address for block in live]


@given(REQUESTS, st.sampled_from(CONFS))
def test_everything_freed_can_all_be_given_back(requests, conf):
    allocator, live = make(conf), []
    run(allocator, requests, live)
    statistics = allocator.statistics()
    assert statistics.requested_bytes <= statistics.allocated_bytes <= statistics.reserved_bytes
    for block in live:
        allocator.free(block)
    allocator.empty_cache()
    assert set(vars_of(allocator.statistics())) == {0}


def vars_of(statistics):
    return [getattr(statistics, name) for name in statistics.__struct_fields__]
