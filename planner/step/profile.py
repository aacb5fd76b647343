"""What a phase of the step holds on top of the tensors that are resident whatever the phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from optplan.planner.allocator import ROUNDING
from optplan.planner.dtypes import ITEMSIZE_BYTES, Dtype
from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel
from optplan.planner.tensors import Parameter
from optplan.planner.timeline import Allocation, Category, Timeline, TimelineBuilder
from optplan.planner.units import round_up


class PhaseMemory(msgspec.Struct, frozen=True):
    """What one phase holds at its peak on top of the resident tensors, in bytes rounded as the allocator rounds."""

    categories: dict[Category, int]

    @property
    def peak_bytes(self) -> int:
        """All categories together."""
        return sum(self.categories.values())

    def merged_with(self, other: Mapping[Category, int]) -> dict[Category, int]:
        """Bytes by category of this phase and `other` together, empty categories left out."""
        names = [*other, *(name for name in self.categories if name not in other)]
        totals = {name: self.categories.get(name, 0) + other.get(name, 0) for name in names}
        return {name: size for name, size in totals.items() if size}

    def on_top_of(self, other: PhaseMemory) -> PhaseMemory:
        """This phase while everything of `other` is alive too."""
        return PhaseMemory(self.merged_with(other.categories))


def optimizer_phase(
    optimizer: OptimizerModel,
    parameters: Sequence[Parameter],
    context: OptimizerContext,
    *,
    master: Dtype | None = None,
) -> PhaseMemory:
    """What one steady `step()` allocates at its peak.

    Args:
        optimizer: Bound to the model.
        parameters: The model's parameters, tied aliases left out.
        master: Dtype of the master weights, if the optimizer updates those: `torch.optim` then needs every gradient in
            that dtype, copied before the step.
    """
    timeline = TimelineBuilder("step")
    if master is not None:
        for parameter in parameters:
            size = parameter.numel * ITEMSIZE_BYTES[master]
            timeline.alloc(size, "optimizer_temporaries", f"gradient in {master} of {parameter.name}")
    optimizer.write_step(timeline, parameters, context)
    return PhaseMemory({"optimizer_temporaries": _peak_bytes(timeline.events)})


def _peak_bytes(events: Timeline) -> int:
    sizes: dict[int, int] = {}
    in_use = peak = 0
    for event in events:
        if isinstance(event, Allocation):
            sizes[event.id] = size = round_up(event.bytes, ROUNDING)
            in_use += size
            peak = max(peak, in_use)
        else:
            in_use -= sizes.pop(event.id)
    return peak
