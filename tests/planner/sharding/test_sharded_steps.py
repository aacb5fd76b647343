"""What MicroAdam gathers in a step on shards, against the real optimizer."""

import pytest
import torch
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from optplan.optim_impls import MicroAdam
from optplan.planner.optimizers.base import OptimizerContext
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.sharding.optimizer_steps import write_sharded_step
from optplan.planner.sharding.shards import RowShard
from optplan.planner.tensors import Parameter
from optplan.planner.timeline import Allocation, TimelineBuilder

SHAPES = [(203, 96), (96, 96), (96,), (32, 96), (48, 64)]
BLOCK = 256


class Requests(TorchDispatchMode):
    """Bytes of the tensors that are made like others but of another size, which is how the batch gathers."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.new_empty.default:
            self.sizes.append(result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(("rank", "world"), [(0, 2), (1, 2), (0, 3), (2, 3), (5, 8)])
def test_micro_adam_gathers_what_is_planned(rank, world, fake_rank):
    with fake_rank(rank, world) as mesh:
        parameters = [
            torch.nn.Parameter(
                distribute_tensor(torch.zeros(shape, dtype=torch.bfloat16), mesh, [Shard(0)], src_data_rank=None)
            )
            for shape in SHAPES
        ]
        optimizer = MicroAdam(parameters, block=BLOCK, backend="torch")
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        with Requests() as requests:
            optimizer.step()
    timeline = TimelineBuilder("step")
    planned = [Parameter(str(index), shape, "mlp", "linear") for index, shape in enumerate(SHAPES)]
    context = OptimizerContext("bfloat16", "bfloat16")
    write_sharded_step(
        timeline, build_optimizer("micro-adam", {"block": BLOCK}), planned, context, RowShard(world, rank)
    )
    gathered = [e.bytes for e in timeline.events if isinstance(e, Allocation) and "launch table" not in e.name]
    assert gathered == requests.sizes
