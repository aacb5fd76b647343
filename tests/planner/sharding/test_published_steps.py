"""Published memory of large training steps, and DeepSpeed's own formulas, beside ours."""

from functools import cache

import pytest

from optplan.planner.candidates import choose_optimizers
from optplan.planner.catalog import load_model
from optplan.planner.estimate import estimate
from optplan.planner.request import check_request
from optplan.planner.sharding.deepspeed import REDUCE_BUCKET_NUMEL
from optplan.planner.sharding.published_steps import published_steps
from optplan.planner.units import GIB
from optplan.planner.workload import Workload

STEPS = {row.id: row for row in published_steps()}
LLAMA = load_model("llama-2-7b")
NUMEL = 6_738_415_616


@cache
def reserved_gib(id_, checkpointing):
    row = STEPS[id_]
    workload = Workload(check_request(load_model(row.model), gpu="h100", checkpointing=checkpointing, **row.step))
    (candidate,), _ = workload.candidates(choose_optimizers("adamw"))
    return workload.peaks(candidate).reserved_bytes / GIB


@pytest.mark.parametrize("row", STEPS.values(), ids=lambda row: row.id)
def test_the_published_figure_lies_between_two_settings(row):
    lower, upper = (reserved_gib(row.id, checkpointing) for checkpointing in row.between)
    assert lower < row.value_gib < upper


def test_sixteen_times_the_gpus_save_what_the_shards_shrink():
    few, many = STEPS["torchtitan-llama-3.1-8b-8-gpus"], STEPS["torchtitan-llama-3.1-8b-128-gpus"]
    ours = reserved_gib(few.id, "full") - reserved_gib(many.id, "full")
    # 16 B a parameter: fp32 shard, gradient and two moments; blocks' rests and caches come on top.
    shards = 16 * 8_030_261_248 * (1 / 8 - 1 / 128) / GIB
    assert few.value_gib - many.value_gib == pytest.approx(15.4)
    assert ours == pytest.approx(few.value_gib - many.value_gib, abs=0.5)
    assert shards == pytest.approx(14.02, abs=0.01)


@pytest.mark.parametrize("gpus", [2, 8, 64])
def test_zero2_is_deepspeeds_formula_with_gradients_partitioned(gpus):
    # DeepSpeed's estimator: 4 P + 16 P / W, in which 2 P are 16-bit gradients on every rank. Stage 2 keeps 1 / W.
    (row,) = estimate(
        LLAMA, gpu="h200", gpus=gpus, sharding="zero2", precision="mixed", batch_size=1, seq_len=8, optimizer="adamw"
    ).estimates
    theirs = 4 * NUMEL + 16 * NUMEL / gpus
    workspaces = 64 * 2**20
    ours = row.phases["step"].peak_allocated_bytes - workspaces
    assert ours == pytest.approx(theirs - 2 * NUMEL + 2 * NUMEL / gpus, rel=0.0002)
    assert row.bytes.gradients == 2 * NUMEL // gpus


def test_the_bucket_lives_in_backward():
    peaks = {}
    for sharding in ("zero1-deepspeed", "zero2"):
        (row,) = estimate(
            LLAMA, gpu="h200", gpus=8, sharding=sharding, precision="mixed", seq_len=512, optimizer="adamw"
        ).estimates
        peaks[sharding] = row.peak_categories.get("communication", 0), row.bytes.gradients
    assert peaks["zero2"][0] == pytest.approx(2 * REDUCE_BUCKET_NUMEL, rel=0.0005)
    assert peaks["zero2"][1] == 2 * NUMEL // 8
    assert peaks["zero1-deepspeed"][1] == 2 * NUMEL
