"""Estimates under settings of torch's allocator."""

import pytest

from optplan.planner.candidates import choose_optimizers
from optplan.planner.catalog import load_model
from optplan.planner.errors import ConfigError
from optplan.planner.estimate import estimate
from optplan.planner.request import check_request
from optplan.planner.workload import Workload


def workload_of(alloc_conf, **flags):
    request = check_request(load_model("gpt2"), gpu="a100-40g", seq_len=512, alloc_conf=alloc_conf, **flags)
    workload = Workload(request)
    (candidate,), _ = workload.candidates(choose_optimizers("adamw", None))
    return workload, candidate


@pytest.mark.parametrize("flags", [{}, {"precision": "fp32", "batch_size": 3}, {"precision": "amp"}])
def test_in_expandable_segments_a_peak_is_the_sum_of_its_rounded_requests(flags):
    workload, candidate = workload_of("expandable_segments:True", **flags)
    assert workload.peaks(candidate).peak_bytes == workload.rounded_peak_bytes(candidate)
    plain, _ = workload_of(None, **flags)
    assert plain.peaks(candidate).peak_bytes >= workload.peaks(candidate).peak_bytes


def test_settings_that_say_what_torch_does_anyway_change_nothing():
    plain, candidate = workload_of(None)
    said, _ = workload_of("expandable_segments:False,backend:native")
    assert said.peaks(candidate) == plain.peaks(candidate)


def test_requests_rounded_to_powers_of_two_take_more_and_leave_room_for_fewer_sequences():
    plain, candidate = workload_of(None)
    rounded, _ = workload_of("roundup_power2_divisions:2")
    assert rounded.peaks(candidate).peak_bytes > plain.peaks(candidate).peak_bytes
    largest = rounded.max_batch_size(candidate)
    assert 0 < largest <= plain.max_batch_size(candidate)
    usable = rounded.request.gpu.usable_bytes
    assert rounded.peaks(candidate, batch_size=largest).peak_bytes <= usable
    assert rounded.peaks(candidate, batch_size=largest + 1).peak_bytes > usable


def test_the_settings_are_part_of_the_record_and_of_the_recommended_command():
    report = estimate("gpt2", gpu="a100-40g", optimizer="adamw", alloc_conf="expandable_segments:True")
    assert report.config.alloc_conf == "expandable_segments:True"
    assert report.recommendation.command.endswith("--alloc-conf expandable_segments:True")
    assert estimate("gpt2", gpu="a100-40g", optimizer="adamw").config.alloc_conf == ""


def test_what_has_no_effect_on_an_estimate_is_named():
    report = estimate(
        "gpt2",
        gpu="a100-40g",
        optimizer="adamw",
        alloc_conf="garbage_collection_threshold:0.8,per_process_memory_fraction:0.9,pinned_num_register_threads:4",
    )
    assert [note for note in report.notes if "--alloc-conf" in note] == [
        "pinned_num_register_threads in --alloc-conf has no effect on an estimate",
        "garbage_collection_threshold in --alloc-conf has no effect on an estimate",
        "per_process_memory_fraction in --alloc-conf has no effect on an estimate",
    ]


def test_settings_that_cannot_be_taken_are_refused():
    with pytest.raises(ConfigError) as error:
        check_request(load_model("gpt2"), gpu="a100-40g", alloc_conf="max_split_size_mb:2")
    assert str(error.value) == "max_split_size_mb in --alloc-conf must be an integer of at least 20, got '2'"


def test_a_never_split_block_counts_whole():
    # Every tensor of 20 MiB or more keeps what its block is larger by, up to 20 MiB of it.
    plain, candidate = workload_of(None, batch_size=8)
    kept, _ = workload_of("max_split_size_mb:20", batch_size=8)
    assert kept.peaks(candidate).peak_bytes > plain.peaks(candidate).peak_bytes
    assert kept.peaks(candidate).reserved_bytes > plain.peaks(candidate).reserved_bytes
