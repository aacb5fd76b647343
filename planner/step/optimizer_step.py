"""What the optimizer's `step()` allocates on the device, master weights included."""

from __future__ import annotations

from collections.abc import Sequence

from optplan.planner.allocator.caching import ROUNDING
from optplan.planner.dtypes import ITEMSIZE_BYTES, Dtype
from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel
from optplan.planner.tensors import Parameter
from optplan.planner.timeline import Allocation, Timeline, TimelineBuilder
from optplan.planner.units import round_up

COPIED = "gradient in"
"""How the names of the copied gradients begin; the first step makes the optimizer's state after them."""


def write_optimizer_step(
    timeline: TimelineBuilder,
    optimizer: OptimizerModel,
    parameters: Sequence[Parameter],
    context: OptimizerContext,
    *,
    master: Dtype | None,
) -> None:
    """Append the allocations and frees of one steady `step()`.

    Args:
        timeline: Where to append.
        optimizer: Bound to the model.
        parameters: The model's parameters, tied aliases left out.
        context: The dtypes that the optimizer meets.
        master: Dtype of the master weights, if the optimizer updates those: `torch.optim` then needs every gradient in
            that dtype, copied before the step.
    """
    copies = [
        timeline.alloc(p.numel * ITEMSIZE_BYTES[master], "optimizer_temporaries", f"{COPIED} {master} of {p.name}")
        for p in parameters
        if master
    ]
    optimizer.write_step(timeline, parameters, context)
    timeline.free(*copies)


def temporary_bytes(timeline: Timeline) -> int:
    """Most bytes alive at once, each request rounded up to 512 bytes; 0 for a step that allocates nothing."""
    sizes: dict[int, int] = {}
    in_use = most = 0
    for event in timeline:
        if isinstance(event, Allocation):
            sizes[event.id] = size = round_up(event.bytes, ROUNDING)
            in_use += size
            most = max(most, in_use)
        else:
            in_use -= sizes.pop(event.id)
    return most
