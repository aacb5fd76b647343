"""Lion, as pytorch_optimizer implements it.

Source: pytorch_optimizer 4.1.0 `optimizer/lion.py`; batched tensor operations are its default.
"""

from __future__ import annotations

from collections.abc import Sequence

from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel, itemsize
from optplan.planner.optimizers.options import Option
from optplan.planner.optimizers.parts import like_parameter
from optplan.planner.optimizers.scratch import Scratch
from optplan.planner.tensors import Parameter, StateTensor
from optplan.planner.timeline import TimelineBuilder


class Lion(OptimizerModel):
    """One momentum like the parameter; the update is its own tensor, of the whole group when batched."""

    OPTIONS = (Option("foreach", "boolean", True, "update the whole group at once: a copy of its moments"),)

    def state(self, parameter: Parameter, context: OptimizerContext) -> tuple[StateTensor, ...]:
        """The momentum."""
        return (like_parameter("exp_avg", parameter, self.state_dtype(context)),)

    def write_step(self, timeline: TimelineBuilder, parameters: Sequence[Parameter], context: OptimizerContext) -> None:
        """The updates: of all tensors at once, or one beside the last."""
        scratch, width = Scratch(timeline), itemsize(self.state_dtype(context))
        updates = {p.name: ("update", p.numel * width) for p in parameters}
        if self.options["foreach"]:
            scratch.free(*[scratch.alloc(p, updates[p.name]) for p in parameters])
            return
        for p in parameters:
            scratch.assign("update", p, updates[p.name])
        scratch.close()
