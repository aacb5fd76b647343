"""DistributedDataParallel: every rank keeps everything, and gradients are added up in buckets.

Buckets are filled with gradients in the order of the parameters, the first up to 1 MiB, each further one until it has
25 MiB; a tensor is never cut. They exist from construction. With `gradient_as_bucket_view` the gradients are views of
them, so that `zero_grad` frees nothing; a gradient is copied in as soon as it is there. The first backward shows in
which order gradients arrive; the second step makes the buckets anew in that order while the old ones live.

Source: torch 2.13 `nn/parallel/distributed.py` (`_ddp_init_helper`, `_pre_forward`) and
`csrc/distributed/c10d/reducer.cpp` (`compute_bucket_assignment_by_size`, `initialize_buckets`,
`mark_variable_ready_dense`); that old and new buckets exist together until the second backward is over was measured on
two H200s.
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


def buckets(sizes: Sequence[int]) -> list[int]:
    """Bytes of the buckets for gradients of these bytes in this order."""
    result: list[int] = []
    filled = 0
    for size in sizes:
        filled += size
        if filled >= (BUCKET_BYTES if result else FIRST_BUCKET_BYTES):
            result.append(filled)
            filled = 0
    return result + [filled] * (filled > 0)


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
        """The first buckets."""
        # They are made in the order in which gradients are expected: the last parameters' first.
        return self._rows(reversed(buckets(_sizes(view))))

    def rebuilt(self, view: ModelView) -> Iterator[Resident]:
        """The buckets in the order in which gradients arrived."""
        return self._rows(buckets(_sizes(view)[::-1]))

    def _rows(self, sizes: Iterator[int] | Sequence[int]) -> Iterator[Resident]:
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
