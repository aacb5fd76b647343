"""The smallest number of GPUs on which a step fits."""

import pytest

from optplan.planner.candidates import choose_optimizers
from optplan.planner.catalog import load_model
from optplan.planner.errors import ConfigError
from optplan.planner.estimate import estimate
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.request import check_request
from optplan.planner.sharding.search import little_padding, possible_counts, smallest_fitting
from optplan.planner.workload import Workload

ADAMW = build_optimizer("adamw")


def test_gpus_are_rented_one_by_one_within_a_machine_and_then_by_machines():
    assert possible_counts("h100-80g", most=32) == [1, 2, 3, 4, 5, 6, 7, 8, 16, 24, 32]


def test_numbers_that_pad_the_rows_much_are_left_out():
    # 3000 ranks would store 6000 rows for 4096, 4104 ranks 12312 for 11008; 48 ranks 4128 and 11040.
    assert little_padding(load_model("llama-2-7b"), [1, 8, 48, 3000, 4104]) == [1, 8, 48]


def test_a_model_that_fits_on_one_gpu_takes_one():
    found = smallest_fitting(check_request(load_model("llama-2-7b"), gpu="a100-80g"), ADAMW)
    assert (found.num_gpus, found.sharding, found.tried) == (1, "none", {1: True})


@pytest.mark.parametrize(
    ("model", "gpu", "sharding"), [("llama-2-13b", "a100-80g", "fsdp2"), ("llama-2-7b", "a100-40g", "fsdp2-noreshard")]
)
def test_the_number_found_fits_and_the_one_before_does_not(model, gpu, sharding):
    found = smallest_fitting(check_request(load_model(model), gpu=gpu), ADAMW, sharding=sharding, most=64)
    counts = possible_counts(gpu)
    below = counts[counts.index(found.num_gpus) - 1]
    fits = {}
    for count in (below, found.num_gpus):
        where = {"gpus": count, "sharding": sharding} if count > 1 else {}
        workload = Workload(check_request(load_model(model), gpu=gpu, **where))
        (candidate,), _ = workload.candidates(choose_optimizers("adamw"))
        fits[count] = workload.has_room(candidate, 1)
    assert fits == {below: False, found.num_gpus: True}
    assert found.peak_bytes == workload.peaks(candidate).peak_bytes


def test_where_every_rank_holds_everything_no_number_helps():
    request = check_request(load_model("llama-2-13b"), gpu="a100-80g")
    assert smallest_fitting(request, ADAMW, sharding="ddp", most=64) is None


def test_a_family_without_rules_is_refused():
    request = check_request(load_model("falcon-7b"), gpu="h100")
    with pytest.raises(ConfigError) as error:
        smallest_fitting(request, ADAMW)
    assert str(error.value) == "falcon models have no step rules: how many GPUs they need is open"


@pytest.mark.parametrize(
    ("model", "flags", "sentence"),
    [
        (
            "llama-2-7b",
            {"gpus": 4, "sharding": "ddp", "precision": "mixed"},
            "2 GPUs have room by bytes with --sharding fsdp2, one has not",
        ),
        (
            "llama-3.1-405b",
            {"gpus": 8, "sharding": "fsdp2", "precision": "mixed", "checkpointing": "full"},
            "176 GPUs on 22 nodes have room by bytes with --sharding fsdp2, 168 have not",
        ),
        (
            "palm-540b",
            {"gpus": 64, "sharding": "fsdp2", "precision": "mixed", "checkpointing": "full"},
            "712 GPUs on 89 nodes have room by bytes with --sharding fsdp2, 616 have not",
        ),
        (
            "llama-3.1-405b",
            {"gpus": 8, "tensor_parallel": 8},
            "no number of GPUs up to 16,384 has room with --sharding fsdp2: what every rank needs is more",
        ),
    ],
)
def test_an_estimate_that_does_not_fit_says_on_how_many_gpus_it_would(model, flags, sentence):
    report = estimate(model, gpu="h100", optimizer="adamw", **flags)
    assert report.estimates[0].fits is False
    assert report.notes[-1] == sentence


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
    assert not [note for note in report.notes if "room" in note]
