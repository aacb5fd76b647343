import pytest

from optplan.planner.allocator.caching import CachingAllocator
from optplan.planner.replay import LiveTensor, replay, replay_blocks
from optplan.planner.timeline import TimelineBuilder
from optplan.planner.units import MIB


def small_step():
    timeline = TimelineBuilder("load")
    timeline.alloc(1000, "parameters", "weight")
    timeline.phase = "forward"
    activation = timeline.alloc(2000, "activations", "output")
    timeline.free(timeline.alloc(3000, "workspace", "scratch"))
    timeline.phase = "backward"
    gradient = timeline.alloc(1000, "gradients", "weight gradient")
    timeline.free(activation)
    timeline.phase = "zero"
    timeline.free(gradient)
    return timeline.events


def test_requests_are_added_up_in_multiples_of_512():
    result = replay(small_step())
    assert result.phases == {"load": 1024, "forward": 1024 + 2048 + 3072, "backward": 1024 + 2048 + 1024, "zero": 2048}
    assert (result.peak_bytes, result.peak_phase, result.peak_index) == (6144, "forward", 2)
    assert result.categories == {"parameters": 1024, "activations": 2048, "workspace": 3072}
    assert result.largest[0] == LiveTensor("scratch", "workspace", 3072)
    assert (result.end_bytes, result.reserved_bytes) == (1024, None)


def test_the_rounding_can_be_left_out():
    assert replay(small_step(), rounding=1).phases == {"load": 1000, "forward": 6000, "backward": 4000, "zero": 2000}


def test_a_phase_begins_with_what_is_alive():
    timeline = TimelineBuilder("forward")
    held = timeline.alloc(4096, "activations", "output")
    timeline.phase = "backward"
    timeline.free(held)
    assert replay(timeline.events).phases == {"forward": 4096, "backward": 4096}


def test_of_equal_peaks_the_first_counts():
    timeline = TimelineBuilder("forward")
    timeline.free(timeline.alloc(512, "activations", "first"))
    timeline.phase = "backward"
    timeline.free(timeline.alloc(512, "activations", "second"))
    result = replay(timeline.events)
    assert (result.peak_phase, result.largest[0].name) == ("forward", "first")


def test_ten_of_the_largest_are_told_largest_first():
    timeline = TimelineBuilder("load")
    for index in range(12):
        timeline.alloc(512 * (index + 1), "parameters", f"weight {index}")
    assert [tensor.name for tensor in replay(timeline.events).largest] == [f"weight {i}" for i in range(11, 1, -1)]


def test_blocks_count_with_the_rest_that_they_keep():
    timeline = TimelineBuilder("load")
    timeline.alloc(11 * MIB, "parameters", "weight")
    result = replay_blocks(timeline.events)
    assert (result.peak_bytes, result.reserved_bytes) == (12 * MIB, 12 * MIB)
    assert replay(timeline.events).peak_bytes == 11 * MIB


def test_what_came_before_shapes_the_blocks_but_not_the_phases():
    timeline = TimelineBuilder("load")
    weight = timeline.alloc(24 * MIB, "parameters", "weight")
    first = list(timeline.events)
    timeline.phase = "forward"
    timeline.free(weight)
    timeline.alloc(23 * MIB, "activations", "output")
    result = replay_blocks(timeline.events[len(first) :], before=first)
    assert result.phases == {"forward": 24 * MIB}
    assert (result.peak_bytes, result.categories) == (24 * MIB, {"parameters": 24 * MIB})
    assert (result.end_bytes, result.reserved_bytes) == (24 * MIB, 24 * MIB)


def test_an_allocator_can_be_brought_along():
    allocator = CachingAllocator()
    allocator.alloc(512)
    timeline = TimelineBuilder("load")
    timeline.alloc(512, "parameters", "weight")
    assert replay_blocks(timeline.events, allocator=allocator).phases == {"load": 1024}


@pytest.mark.parametrize("play", [replay, replay_blocks])
def test_a_timeline_without_events_is_refused(play):
    with pytest.raises(ValueError, match=r"^a timeline without events has no peak$"):
        play([])
