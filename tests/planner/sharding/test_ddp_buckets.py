"""DDP's buckets and what they leave reserved: two ranks of each of four steps measured on H200s, rank by rank.

Reserved bytes are as measured, to the byte: the first bucket was gone, or still there, as the second step made the
others. The larger share of ZeRO's optimizer that rank 1 has shows in its state.
"""

import pytest

from optplan.planner.candidates import choose_optimizers, optimizer_context
from optplan.planner.catalog import load_model
from optplan.planner.request import check_request
from optplan.planner.requested_step import sharded_view, step_options
from optplan.planner.sharding.ddp import buckets
from optplan.planner.sharding.rank import rank_footprint, write_rank_step
from optplan.planner.step.simulation import StepSimulator
from optplan.planner.timeline import TimelineBuilder
from optplan.planner.units import MIB
from optplan.planner.workload import Workload

MEASURED = [
    ("ddp", "adamw", 0, "freed", 18_371_051_520, 16_703_163_904),
    ("ddp", "adamw", 1, "kept", 19_807_600_640, 16_704_204_288),
    ("ddp", "micro-adam", 0, "freed", 13_505_658_880, 12_974_906_880),
    ("ddp", "micro-adam", 1, "freed", 13_505_658_880, 12_974_906_880),
    ("zero1", "adamw", 0, "freed", 15_458_107_392, 14_234_455_040),
    ("zero1", "adamw", 1, "freed", 15_458_107_392, 14_232_620_032),
    ("zero1", "micro-adam", 0, "freed", 13_425_967_104, 12_362_042_880),
    ("zero1", "micro-adam", 1, "freed", 13_440_647_168, 12_360_648_192),
]  # fmt: skip


def request_of(sharding):
    step = {"precision": "bf16", "batch_size": 1, "seq_len": 2048, "sharding": sharding}
    return check_request(load_model("llama-3.2-1b"), gpu="h200", gpus=2, **step)


def simulate(sharding, optimizer, rank):
    request = request_of(sharding)
    strategy = request.strategy.at(rank)
    (candidate,), _ = Workload(request).candidates(choose_optimizers(optimizer))
    parameters, context = request.rank_model.trained_parameters, optimizer_context(request)
    updated = strategy.updated(parameters)
    footprint = rank_footprint(candidate.optimizer, parameters, context, strategy)
    timeline = TimelineBuilder("step")
    write_rank_step(timeline, candidate.optimizer, updated, context, master=None, strategy=strategy)
    simulator = StepSimulator(request.model, step_options(request), strategy=strategy)
    return simulator.simulate(footprint.device_sizes(updated), timeline.events)


@pytest.mark.parametrize(("sharding", "optimizer", "rank", "first_bucket", "reserved", "peak"), MEASURED)
def test_reserved_bytes_of_a_rank_are_those_measured_to_the_byte(
    sharding, optimizer, rank, first_bucket, reserved, peak
):
    step = simulate(sharding, optimizer, rank)
    assert step.reserved_range_bytes[first_bucket == "kept"] == reserved
    assert step.reserved_bytes == step.reserved_range_bytes[0]
    # Where the first bucket lived beside the others these lie in segments of their own, with a MiB of rounding more.
    assert max(step.phases.values()) == pytest.approx(peak, abs=8192 if first_bucket == "freed" else MIB)


MATRIX, LAYER_NORM = 32 * MIB, 4096
"""Of a layer of Llama-3.2-1B in bf16; queries and outputs have 8 MiB, keys and values 2 each."""


def test_buckets_are_one_at_first_and_then_closed_at_1_and_25_mib_in_the_order_of_backward():
    request = request_of("ddp")
    view, strategy = sharded_view(request), request.strategy
    assert [size for _, size, _ in strategy.replaced(view)] == [2 * 1_235_814_400]
    sizes = [size for _, size, _ in strategy.kept(view)]
    attention = 20 * MIB
    assert sizes[0] == MATRIX + 3 * LAYER_NORM
    assert sizes[1:4] == [MATRIX, MATRIX, attention + 2 * LAYER_NORM + MATRIX]
    assert sizes[-1] == attention + 128_256 * 2048 * 2
    assert sum(sizes) == 2 * 1_235_814_400


def test_parameters_are_broadcast_in_flat_copies_of_250_mib_but_for_one_alone():
    layer = 20 * MIB + 3 * MATRIX + 2 * LAYER_NORM
    passing = list(request_of("ddp").strategy.passing(sharded_view(request_of("ddp"))))
    # The embedding is large enough alone and sent as it is; of the layers after it two and 20 MiB more fill a copy.
    assert passing[0] == 2 * layer + 20 * MIB
    assert all(250 * MIB <= size < 250 * MIB + MATRIX for size in passing[:-1])
    assert sum(passing) == 16 * layer + LAYER_NORM


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([], []), ([1], [1]), ([MIB, 5, 25 * MIB, 7], [MIB, 25 * MIB + 5, 7]), ([MIB - 1, 3, 4], [MIB + 2, 4])],
)
def test_a_bucket_is_closed_by_the_tensor_that_fills_it(sizes, expected):
    assert buckets(sizes) == expected


def test_the_prediction_has_both_ends_and_plans_for_the_second_step_that_needs_more():
    workload = Workload(request_of("ddp"))
    (candidate,), _ = workload.candidates(choose_optimizers("adamw"))
    assert workload.peaks(candidate).reserved_range_bytes == (18_371_051_520, 19_807_600_640)
    assert workload.request.gpu.usable_bytes - workload.usable_bytes == 2 * 1_235_814_400
