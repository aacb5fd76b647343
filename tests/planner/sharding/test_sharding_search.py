"""The smallest number of GPUs on which a step fits."""

import pytest

from optplan.planner.candidates import choose_optimizers
from optplan.planner.catalog import load_model
from optplan.planner.errors import ConfigError
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.request import check_request
from optplan.planner.sharding.search import possible_counts, smallest_fitting
from optplan.planner.workload import Workload

ADAMW = build_optimizer("adamw")


def test_gpus_are_rented_one_by_one_within_a_machine_and_then_by_machines():
    assert possible_counts("h100-80g", most=32) == [1, 2, 3, 4, 5, 6, 7, 8, 16, 24, 32]


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
        fits[count] = workload.fits(candidate)
    assert fits == {below: False, found.num_gpus: True}
    assert found.peak_bytes == workload.peaks(candidate).peak_bytes


def test_where_every_rank_holds_everything_no_number_helps():
    request = check_request(load_model("llama-2-13b"), gpu="a100-80g")
    assert smallest_fitting(request, ADAMW, sharding="ddp", most=64) is None


def test_a_family_without_rules_is_refused():
    request = check_request(load_model("palm-540b"), gpu="h100")
    with pytest.raises(ConfigError) as error:
        smallest_fitting(request, ADAMW)
    assert str(error.value) == "palm models have no step rules: how many GPUs they need is open"
