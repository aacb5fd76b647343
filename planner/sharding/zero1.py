"""ZeRO stage 1 as torch has it: `ZeroRedundancyOptimizer` under DDP; each rank updates some of the parameters, whole.

Largest first, every parameter goes to the rank that has the fewest elements so far; after the step each rank broadcasts
what it has updated, in place. So a rank's state is about 1 / ranks of all, uneven by up to the largest tensor.

Source: torch 2.13 `distributed/optim/zero_redundancy_optimizer.py` (`_partition_parameters`,
`_broadcast_params_from_rank`, `parameters_as_bucket_view=False`).
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heapreplace

from optplan.planner.sharding.ddp import Ddp
from optplan.planner.tensors import Parameter


def partition(parameters: Sequence[Parameter], num_ranks: int) -> list[list[Parameter]]:
    """The parameters of each rank's optimizer, in the order in which it is given them."""
    result: list[list[Parameter]] = [[] for _ in range(num_ranks)]
    sizes = [(0, rank) for rank in range(num_ranks)]
    heapify(sizes)
    for parameter in sorted(parameters, key=lambda parameter: -parameter.numel):
        size, rank = sizes[0]
        result[rank].append(parameter)
        heapreplace(sizes, (size + parameter.numel, rank))
    return result


class Zero1(Ddp):
    """`ZeroRedundancyOptimizer` and DDP."""

    name = "zero1"

    def updated(self, parameters: Sequence[Parameter]) -> Sequence[Parameter]:
        """This rank's share."""
        return partition(parameters, self.ranks.num_gpus)[self.ranks.rank]
