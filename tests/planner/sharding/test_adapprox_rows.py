"""What Adapprox allocates for its rows of matrices whose rank the kernels do not take, against the real optimizer."""

import weakref

import pytest
import torch
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from optplan.optim_impls import Adapprox
from optplan.planner.optimizers.base import OptimizerContext
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.sharding.optimizer_steps import write_sharded_step
from optplan.planner.sharding.shards import RowShard
from optplan.planner.tensors import Parameter
from optplan.planner.timeline import Allocation, TimelineBuilder

WIDE = [(602, 300), (300, 530), (96,), (301, 1024)]
"""Ranks of 75: chunks of V's rows are the most that is alive."""
TALL = [(24000, 268), (9001, 270)]
"""Ranks of 67: three stages of the sketches are."""


class Peak(TorchDispatchMode):
    """Bytes of the storages that operations made, at most at a time."""

    def __init__(self, known):
        super().__init__()
        self._known = {self._storage(tensor)._cdata for tensor in known}
        self._alive = self.num_bytes = 0

    @staticmethod
    def _storage(tensor):
        return getattr(tensor, "_local_tensor", tensor).untyped_storage()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                self._watch(self._storage(leaf), made=False)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._watch(self._storage(leaf), made=True)
        return result

    def _watch(self, storage, *, made):
        if not storage.nbytes() or storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        size = storage.nbytes() if made else 0
        self._alive += size
        self.num_bytes = max(self.num_bytes, self._alive)
        weakref.finalize(storage, self._end, storage._cdata, size)

    def _end(self, address, size):
        self._known.discard(address)
        self._alive -= size


def planned_peak(shapes, dtype, shard):
    timeline, context = TimelineBuilder("step"), OptimizerContext(dtype, dtype)
    described = [Parameter(str(index), shape, "mlp", "linear") for index, shape in enumerate(shapes)]
    write_sharded_step(timeline, build_optimizer("adapprox", {"rank": "max"}), described, context, shard)
    sizes, alive, peak = {}, 0, 0
    for event in timeline.events:
        if isinstance(event, Allocation):
            sizes[event.id] = event.bytes
        alive += sizes[event.id] if isinstance(event, Allocation) else -sizes[event.id]
        peak = max(peak, alive)
    assert not alive
    return peak


@pytest.mark.parametrize(
    ("shapes", "dtype", "rank", "world"),
    [(WIDE, "bfloat16", 0, 2), (WIDE, "float32", 2, 3), (WIDE, "bfloat16", 63, 64), (TALL, "bfloat16", 1, 2)],
)
def test_a_rank_allocates_what_is_planned(shapes, dtype, rank, world, fake_rank):
    with fake_rank(rank, world) as mesh:
        whole = [torch.zeros(shape, dtype=getattr(torch, dtype)) for shape in shapes]
        parameters = [torch.nn.Parameter(distribute_tensor(w, mesh, [Shard(0)], src_data_rank=None)) for w in whole]
        optimizer = Adapprox(parameters, rank="max", backend="torch")
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        for state in optimizer.state.values():
            if "u_factor" in state:  # other ranks, which are not there, would have filled it
                state["u_factor"].fill_(1)
        states = [value for state in optimizer.state.values() for value in state.values()]
        with Peak([*parameters, *(p.grad for p in parameters), *states]) as peak:
            optimizer.step()
    planned = planned_peak(shapes, dtype, RowShard(world, rank))
    # Norms of columns and other vectors as long as the rank, a dozen for each matrix.
    assert planned <= peak.num_bytes <= planned + 12 * len(shapes) * 75 * 4
