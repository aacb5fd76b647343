"""The second moments of blocks of which several ranks hold parts: sums over every rank's part, added in one order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from optplan.optim_impls.adam_mini.layout import Layout
from optplan.optim_impls.adam_mini.reference import block_numels
from optplan.optim_impls.fingerprint import local_tensor
from optplan.optim_impls.optimizer_base import Part


class SharedBlocks:
    """Those of one param group.

    Every rank sums the squares of its part of each block; the sums of all tensors are gathered in one collective for
    each process group, and added in the order of the ranks, so that all ranks get the same bits whatever the collective
    does. Every rank must have a gradient for the same parameters.

    Args:
        parts: The parts of the group whose tensors have shared blocks; at least one.
        layouts: Of these parts.
    """

    def __init__(self, parts: Sequence[Part], layouts: Sequence[Layout]) -> None:
        # Those of a process group lie together.
        groups = [_group(layout) for layout in layouts]
        order = sorted(range(len(parts)), key=lambda place: groups.index(groups[place]))
        self._moments = [local_tensor(parts[place].state["exp_avg_sq"]) for place in order]
        self._sizes = [layouts[place].blocks.num_blocks for place in order]
        first, self._first = 0, {}
        for place, size in zip(order, self._sizes, strict=True):
            self._first[parts[place].ordinal] = first
            first += size
        numels = [block_numels(layouts[place].blocks, like=self._moments[0]) for place in order]
        self._numels = torch.cat(numels)
        self._ranges = [
            (group, sum(size for place, size in zip(order, self._sizes, strict=True) if groups[place] == group))
            for group in dict.fromkeys(groups[place] for place in order)
        ]

    def sums_at(self, ordinal: int) -> int:
        """Where the sums of a parameter begin; 0 for one whose blocks are not shared."""
        return self._first.get(ordinal, 0)

    def new_sums(self) -> torch.Tensor:
        """Zeros for the sums of this rank, `[blocks]`."""
        return torch.zeros_like(self._numels)

    def advance(self, sums: torch.Tensor, *, beta2: float) -> None:
        """Bring the second moments to this step.

        Args:
            sums: Of the squares of this rank's part of every block, `[blocks]`.
            beta2: Their decay.
        """
        sizes = [size for _, size in self._ranges]
        totals = [
            _add_ranks(part, group) for part, (group, _) in zip(torch.split(sums, sizes), self._ranges, strict=True)
        ]
        means = torch.split(torch.cat(totals) / self._numels, self._sizes)
        torch._foreach_mul_(self._moments, beta2)
        torch._foreach_add_(self._moments, [mean.to(v.dtype) for mean, v in zip(means, self._moments, strict=True)],
                            alpha=1 - beta2)  # fmt: skip


def _add_ranks(own: torch.Tensor, group: Any) -> torch.Tensor:
    """The sum over all ranks, added in their order."""
    # A build of torch without distributed training can run everything else.
    import torch.distributed as dist

    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own.contiguous(), group=group)
    return sum(gathered[1:], start=gathered[0])


def _group(layout: Layout) -> Any:
    assert layout.shards is not None
    return layout.shards.group
