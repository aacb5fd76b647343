"""DistributedDataParallel: every rank keeps everything, and gradients are added up in buckets.

The first step has one bucket for everything, made at construction. Its backward shows in which order gradients arrive;
the second step makes the buckets anew in that order, the first up to 1 MiB, each further one until it has 25 MiB; a
tensor is never cut. With `gradient_as_bucket_view` the gradients are views of the buckets, so that `zero_grad` frees
nothing; a gradient is copied in as soon as it is there.

Before the new buckets are made DDP lets the first one go. The communication library holds on to it until its own
thread, which looks ten times a second, has seen that the first reduction is over, and the next collective is begun. Of
two ranks of one run, measured on H200s, one made the new buckets out of the first one's memory, the other beside it.

Construction sends every parameter from rank 0 to the others in flat copies of 250 MiB, at most two at once.

Source: torch 2.13 `nn/parallel/distributed.py` (`_ddp_init_helper`, `_sync_module_states`, `_pre_forward`),
`csrc/distributed/c10d/reducer.cpp` (`compute_bucket_assignment_by_size`, `initialize_buckets`,
`mark_variable_ready_dense`, `rebuild_buckets`), `comm.cpp` (`broadcast_coalesced`), `ProcessGroupNCCL.cpp`
(`shelvesToUnstash_`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from optplan.planner.sharding.base import ModelView, Ranks, Resident, Sized, Strategy
from optplan.planner.step.graph import Storage
from optplan.planner.step.hooks import StepHooks
from optplan.planner.step.tape import Tape
from optplan.planner.units import MIB

FIRST_BUCKET_BYTES = MIB
BUCKET_BYTES = 25 * MIB
BROADCAST_BYTES = 250 * MIB


def buckets(sizes: Sequence[int]) -> list[int]:
    """Bytes of the buckets for gradients of these bytes in this order."""
    return [sum(group) for group in _groups(sizes, [FIRST_BUCKET_BYTES, BUCKET_BYTES])]


def _groups(sizes: Sequence[int], limits: Sequence[int]) -> list[list[int]]:
    """Sizes in their order, each group until it has its limit; the last limit is that of all further ones."""
    result: list[list[int]] = [[]]
    for size in sizes:
        result[-1].append(size)
        if sum(result[-1]) >= limits[min(len(result), len(limits)) - 1]:
            result.append([])
    return [group for group in result if group]


class _BucketedHooks(StepHooks):
    """Every gradient is copied into its bucket and freed."""

    def takes_gradient(self, t: Tape, key: tuple[int | None, str], storage: Storage) -> bool:
        """It is let go at once."""
        del t, key, storage
        return True


class Ddp(Strategy):
    """`DistributedDataParallel`.

    Args:
        ranks: The processes.
        views: Whether gradients are views of the buckets (`gradient_as_bucket_view`).
    """

    name = "ddp"

    def __init__(self, ranks: Ranks, *, views: bool = True) -> None:
        super().__init__(ranks)
        self._views = views

    def kept(self, view: ModelView) -> Iterator[Resident]:
        """The buckets in the order in which gradients arrive: the last parameters' first."""
        return self._rows(buckets(_sizes(view)[::-1]))

    def replaced(self, view: ModelView) -> Iterator[Resident]:
        """One bucket for everything."""
        return self._rows([sum(_sizes(view))])

    def passing(self, view: ModelView) -> Iterator[int]:
        """The flat copies in which parameters are broadcast; a single one needs none."""
        return (sum(group) for group in _groups(_sizes(view), [BROADCAST_BYTES]) if len(group) > 1)

    def _rows(self, sizes: Sequence[int]) -> Iterator[Resident]:
        for number, size in enumerate(sizes):
            yield f"bucket {number}", size, "gradients" if self._views else "communication"

    def gradients(self, view: ModelView) -> Iterator[Sized]:
        """None beside the buckets, or one a parameter."""
        return iter(()) if self._views else super().gradients(view)

    def hooks(self, view: ModelView, recorded: Callable[[int], str], *, accumulates: bool) -> StepHooks:
        """Gradients go into the buckets."""
        del view, recorded, accumulates
        return _BucketedHooks() if self._views else StepHooks()


def _sizes(view: ModelView) -> list[int]:
    return [parameter.numel * view.compute_itemsize for parameter in view.parameters]
