"""The smallest number of GPUs on which a step fits, and what an estimate says of it."""

import pytest

from optplan.planner.catalog import load_model
from optplan.planner.errors import ConfigError
from optplan.planner.estimate import estimate
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.request import check_request
from optplan.planner.sharding import search
from optplan.planner.sharding.search import little_padding, possible_counts, smallest_fitting

ADAMW = build_optimizer("adamw")
MIXED = {"precision": "mixed", "checkpointing": "full"}


def test_gpus_are_rented_one_by_one_within_a_machine_and_then_by_machines():
    assert possible_counts("h100-80g", most=32) == [1, 2, 3, 4, 5, 6, 7, 8, 16, 24, 32]


def test_numbers_that_pad_the_rows_much_are_left_out():
    # 3000 ranks would store 6000 rows for 4096, 4104 ranks 12312 for 11008; 48 ranks 4128 and 11040.
    assert little_padding(load_model("llama-2-7b"), [1, 8, 48, 3000, 4104]) == [1, 8, 48]


def test_a_model_that_fits_on_one_gpu_takes_one():
    found = smallest_fitting(check_request(load_model("llama-2-7b"), gpu="a100-80g"), ADAMW)
    assert (found.fitting.num_gpus, found.fitting.sharding, found.tried) == (1, "none", {1: True})


def verdict(row):
    """What an estimate says of a step: whether it fits, and else whether bytes or fragmentation refuse it."""
    if row.fits:
        return "fits"
    reason = "fits by bytes, but fragmentation leaves no room for a request of "
    return "fragmentation" if any(note.startswith(reason) for note in row.notes) else "bytes"


@pytest.mark.parametrize(
    ("model", "optimizer", "step", "refused", "fitting", "sentence"),
    [
        (
            "llama-2-13b", "adamw", {"gpu": "h100", **MIXED}, (2, "bytes"), 3,
            "3 GPUs fit with --sharding fsdp2, 2 have no room",
        ),
        (
            "llama-3.1-8b", "adamw", {"gpu": "rtx-4090-24g", **MIXED}, (8, "fragmentation"), 16,
            "16 GPUs on 2 nodes fit with --sharding fsdp2, 7 have no room; 8 have room by bytes, but fragmentation "
            "leaves none for a request of 3.91 GiB",
        ),
        (
            "opt-30b", "adapprox", {"gpu": "h100", "batch_size": 2}, (32, "fragmentation"), 40,
            "40 GPUs on 5 nodes fit with --sharding fsdp2, 16 have no room; 24 and 32 have room by bytes, but "
            "fragmentation leaves none for a request of 20.72 GiB",
        ),
        (
            "llama-3.1-70b", "adamw", {"gpu": "a100-40g", **MIXED}, (56, "fragmentation"), 64,
            "64 GPUs on 8 nodes fit with --sharding fsdp2, 40 have no room; 48 and 56 have room by bytes, but "
            "fragmentation leaves none for a request of 448.00 MiB",
        ),
        (
            "llama-3.1-405b", "adamw", {"gpu": "h100", **MIXED}, (184, "fragmentation"), 192,
            "192 GPUs on 24 nodes fit with --sharding fsdp2, 168 have no room; 176 and 184 have room by bytes, but "
            "fragmentation leaves none for a request of 512.00 MiB",
        ),
    ],
)  # fmt: skip
def test_the_number_that_an_estimate_names_fits_and_the_one_before_does_not(
    model, optimizer, step, refused, fitting, sentence
):
    below, reason = refused
    counts = little_padding(load_model(model), possible_counts(step["gpu"]))
    assert counts[counts.index(fitting) - 1] == below
    report = estimate(model, optimizer=optimizer, gpus=below, sharding="fsdp2", **step)
    assert verdict(report.estimates[0]) == reason
    assert report.notes[-1] == sentence
    if reason == "fragmentation":
        assert (report.estimates[0].max_batch_size or 0) < report.config.batch_size
    named = estimate(model, optimizer=optimizer, gpus=fitting, sharding="fsdp2", **step)
    assert verdict(named.estimates[0]) == "fits"


@pytest.mark.parametrize(
    ("model", "gpu", "step", "reason"),
    [
        ("llama-2-13b", "a100-80g", {}, "bytes"),
        ("llama-2-7b", "a100-80g", {"precision": "fp32", "checkpointing": "full"}, "fragmentation"),
    ],
)
def test_two_gpus_fit_where_one_does_not(model, gpu, step, reason):
    optimizer = "adam-mini" if step else "adamw"
    found = smallest_fitting(check_request(load_model(model), gpu=gpu, **step), build_optimizer(optimizer))
    assert found.tried == {1: False, 2: True}
    assert verdict(estimate(model, optimizer=optimizer, gpu=gpu, **step).estimates[0]) == reason
    named = estimate(model, optimizer=optimizer, gpu=gpu, gpus=2, sharding="fsdp2", **step).estimates[0]
    assert verdict(named) == "fits"
    assert found.fitting.peak_bytes == named.peak_allocated_bytes


def test_where_every_rank_holds_everything_no_number_helps():
    found = smallest_fitting(check_request(load_model("llama-2-13b"), gpu="a100-80g"), ADAMW, sharding="ddp", most=64)
    assert (found.fitting, found.shortages) == (None, {})


def test_a_family_without_rules_is_refused():
    request = check_request(load_model("falcon-7b"), gpu="h100")
    with pytest.raises(ConfigError) as error:
        smallest_fitting(request, ADAMW)
    assert str(error.value) == "falcon models have no step rules: how many GPUs they need is open"


@pytest.mark.parametrize(
    ("model", "optimizer", "flags", "sentence"),
    [
        (
            "llama-2-7b", "adamw", {"gpus": 4, "sharding": "ddp", "precision": "mixed"},
            "2 GPUs fit with --sharding fsdp2, one has no room",
        ),
        (
            "llama-2-7b", "adam-mini", {"gpu": "a100-80g", "gpus": 2, "sharding": "ddp", "precision": "fp32"},
            "2 GPUs fit with --sharding fsdp2; one has room by bytes, but fragmentation leaves none for a request of "
            "500.00 MiB",
        ),
        (
            "palm-540b", "adamw", {"gpus": 64, "sharding": "fsdp2", **MIXED},
            "no number of GPUs that was tried fits with --sharding fsdp2, 616 have no room; 712 and the 5 numbers "
            "tried after it have room by bytes, but fragmentation leaves none for a request of 8.54 GiB; with "
            "--alloc-conf expandable_segments:True 768 GPUs on 96 nodes fit",
        ),
        (
            "llama-3.1-8b", "adam-mini", {"gpus": 2, "sharding": "fsdp2-noreshard", "precision": "fp32"},
            "64 GPUs on 8 nodes fit with --sharding fsdp2-noreshard, 8 have no room; 16 and the 5 numbers tried after "
            "it have room by bytes, but fragmentation leaves none for a request of 1,002.00 MiB; with --alloc-conf "
            "expandable_segments:True 16 GPUs on 2 nodes fit",
        ),
        (
            "llama-3.1-405b", "adamw", {"gpus": 8, "tensor_parallel": 8},
            "no number of GPUs up to 16,384 has room with --sharding fsdp2: what every rank needs is more",
        ),
    ],
)  # fmt: skip
def test_an_estimate_that_does_not_fit_says_on_how_many_gpus_it_would(model, optimizer, flags, sentence):
    report = estimate(model, optimizer=optimizer, **{"gpu": "h100", **flags})
    assert report.estimates[0].fits is False
    assert report.notes[-1] == sentence


def test_expandable_segments_fit_where_fragmentation_refuses():
    step = {"gpu": "h100", "gpus": 768, "sharding": "fsdp2", **MIXED}
    report = estimate("palm-540b", optimizer="adamw", alloc_conf="expandable_segments:True", **step)
    assert verdict(report.estimates[0]) == "fits"


def test_after_the_numbers_that_are_simulated_the_first_is_taken_that_leaves_room(monkeypatch):
    monkeypatch.setattr(search, "MOST_SIMULATED", 1)
    report = estimate("llama-3.1-405b", optimizer="adamw", gpu="h100", gpus=8, sharding="fsdp2", **MIXED)
    assert report.notes[-1] == (
        "240 GPUs on 30 nodes fit with --sharding fsdp2, 168 have no room; 176 have room by bytes, but fragmentation "
        "leaves none for a request of 512.00 MiB, and no number from there to 240 was tried"
    )


@pytest.mark.parametrize(
    ("model", "optimizer", "flags"),
    [
        ("llama-2-13b", "adamw", {}),
        ("llama-2-13b", "galore", {"gpus": 2, "sharding": "ddp", "precision": "fp32"}),
        ("llama-2-7b", "adamw", {"gpus": 2, "sharding": "fsdp2"}),
        ("falcon-7b", "adamw", {"gpus": 2, "sharding": "fsdp2"}),
    ],
)
def test_where_the_number_is_open_or_not_asked_for_nothing_is_said(model, optimizer, flags):
    report = estimate(model, gpu="h100", optimizer=optimizer, **flags)
    assert not [note for note in report.notes if "room" in note or " fit" in note]
