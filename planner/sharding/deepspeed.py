"""DeepSpeed's ZeRO stages 1 and 2: 16-bit parameters on every rank, fp32 master weights and state of a flat piece each.

The parameters of a rank are views of one flat buffer. Gradients pass through a bucket of fixed size that exists during
backward; stage 1 keeps them all to the step, stage 2 only those of the rank's own piece. The step needs these in fp32.
The updated pieces are gathered in place.

Source: DeepSpeed `runtime/zero/stage_1_and_2.py` (`ipg_buffer`, `grads_in_partition`,
`single_partition_of_fp32_groups`) and `runtime/zero/config.py` (`reduce_bucket_size` 5e8 elements,
`contiguous_gradients`, `overlap_comm` off). Written from its code and documentation, not yet held against a measured
step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from optplan.planner.sharding.base import ModelView, Ranks, Sized, Strategy
from optplan.planner.step.graph import Storage, Tensor
from optplan.planner.step.hooks import StepHooks
from optplan.planner.step.tape import Tape
from optplan.planner.tensors import Parameter
from optplan.planner.units import round_up

REDUCE_BUCKET_NUMEL = 500_000_000
_ALIGNED_NUMEL = 2
"""A rank's piece begins at a multiple of so many elements (`nccl_start_alignment_factor`)."""


class _PartitioningHooks(StepHooks):
    """A bucket during backward; with stage 2, gradients of other ranks' pieces go through it and are freed."""

    def __init__(self, view: ModelView, own_numel: int, *, partitions: bool, accumulates: bool) -> None:
        self._itemsize, self._own_numel = view.compute_itemsize, own_numel
        self._partitions, self._accumulates = partitions, accumulates
        self._bucket: Storage | None = None

    def after_forward(self, t: Tape, loss: Tensor) -> None:
        """Backward begins with the bucket."""
        assert loss.node is not None
        loss.node.before = lambda: self._begin(t)

    def _begin(self, t: Tape) -> None:
        path, t.path = t.path, "DeepSpeed:"
        size = REDUCE_BUCKET_NUMEL * self._itemsize
        self._bucket = t.storage(size, "reduction bucket", "communication")
        if self._partitions and not self._accumulates:
            own = t.storage(self._own_numel * self._itemsize, "gradients of the rank's piece", "gradients")
            t.keep_gradient((None, "gradients of the rank's piece"), own)
        t.path = path

    def takes_gradient(self, t: Tape, key: tuple[int | None, str], storage: Storage) -> bool:
        """With stage 2 none is kept as it came."""
        del t, key, storage
        return self._partitions

    def after_backward(self, t: Tape) -> None:
        """The bucket goes."""
        del t
        self._bucket = None


class DeepSpeed(Strategy):
    """ZeRO stage 1 or 2.

    Args:
        ranks: The processes.
        stage: 1 or 2.
    """

    flattens = True

    def __init__(self, ranks: Ranks, *, stage: int) -> None:
        super().__init__(ranks)
        self.stage = stage
        self.name = "zero1-deepspeed" if stage == 1 else "zero2"

    def _own_numel(self, parameters: Sequence[Parameter]) -> int:
        numel = sum(parameter.numel for parameter in parameters)
        return round_up(numel, _ALIGNED_NUMEL * self.ranks.num_gpus) // self.ranks.num_gpus

    def parameters(self, view: ModelView) -> Iterator[Sized]:
        """One flat buffer."""
        yield "all parameters", self._own_numel(view.parameters) * self.ranks.num_gpus * view.compute_itemsize

    def gradients(self, view: ModelView) -> Iterator[Sized]:
        """Those of the rank's piece, or one a parameter."""
        if self.stage == 1:
            return super().gradients(view)
        return iter([("gradients of the rank's piece", self._own_numel(view.parameters) * view.compute_itemsize)])

    def hooks(self, view: ModelView, recorded: Callable[[int], str], *, accumulates: bool) -> StepHooks:
        """The bucket, and what passes through it."""
        del recorded
        own = self._own_numel(view.parameters)
        return _PartitioningHooks(view, own, partitions=self.stage == 2, accumulates=accumulates)

    def updated(self, parameters: Sequence[Parameter]) -> Sequence[Parameter]:
        """The rank's flat piece."""
        return (Parameter("the rank's piece", (self._own_numel(parameters),), "other", "parameter"),)
