"""SM3, as pytorch_optimizer implements it: one accumulator a dimension.

Source: arXiv 1901.11150; pytorch_optimizer 4.1.0 `optimizer/sm3.py`. The momentum buffer exists even without momentum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel, itemsize
from optplan.planner.optimizers.options import Option
from optplan.planner.optimizers.parts import like_parameter, tensor
from optplan.planner.optimizers.reduction import write_reduction_buffers
from optplan.planner.optimizers.scratch import Scratch
from optplan.planner.reductions import column_reduction_bytes
from optplan.planner.tensors import Parameter, StateTensor
from optplan.planner.timeline import TimelineBuilder


class Sm3(OptimizerModel):
    """`pytorch_optimizer.SM3`: a momentum buffer and an accumulator for each dimension, in the gradient's dtype.

    On CUDA it updates fp32 parameters as one group, 16-bit parameters one by one.
    """

    OPTIONS = (
        Option(
            "momentum", "number", 0.0, "momentum; 0 keeps the buffer all the same, and every update until the last",
            low=0, high=1, high_exclusive=True,
        ),
    )  # fmt: skip

    def state(self, parameter: Parameter, context: OptimizerContext) -> tuple[StateTensor, ...]:
        """Momentum buffer, and an accumulator for each dimension (a scalar has one)."""
        dtype, shape = self.state_dtype(context, own=context.gradient_dtype), parameter.shape
        sizes = [tuple(size if i == axis else 1 for i, size in enumerate(shape)) for axis in range(len(shape))]
        accumulators = [
            tensor(f"accumulator_{axis}", size, dtype, why=f"one for each index of dimension {axis}")
            for axis, size in enumerate(sizes or [()])
        ]
        return (like_parameter("momentum_buffer", parameter, dtype), *accumulators)

    def moved_bytes(self, parameter: Parameter, context: OptimizerContext) -> int:
        """The default; without momentum its buffer is not touched."""
        moved = super().moved_bytes(parameter, context)
        idle = 0 if self.options["momentum"] else 2 * parameter.numel * itemsize(context.gradient_dtype)
        return moved - idle

    def write_step(self, timeline: TimelineBuilder, parameters: Sequence[Parameter], context: OptimizerContext) -> None:
        """The update of one tensor beside the last, or of the whole group for fp32 without momentum."""
        scratch, width = Scratch(timeline), itemsize(context.gradient_dtype)
        is_group = context.parameter_dtype == "float32"
        for p in parameters:
            update = self._write_update(scratch, p, width)
            scratch.bind(f"update of {p.name}" if is_group else "update", update)
            if self.options["momentum"]:
                scratch.drop(f"update of {p.name}" if is_group else "update")  # the buffer takes its place
        scratch.close()

    def _write_update(self, scratch: Scratch, p: Parameter, width: int) -> int:
        """The smallest accumulator of each element grows to the update; then each accumulator is a maximum over it."""
        covered = [math.prod(p.shape[: axis + 1]) for axis in range(len(p.shape))] or [1]
        update = scratch.chain(p, *(("update", numel * width) for numel in covered))
        if len(p.shape) > 1:
            for axis, size in enumerate(p.shape):
                maximum = scratch.alloc(p, ("maximum", size * width))
                if axis == len(p.shape) - 1:
                    sizes = column_reduction_bytes(p.numel // size, size, element_bytes=width)
                    write_reduction_buffers(scratch, p, sizes)
                scratch.bind("nu_max", maximum)
            scratch.drop("nu_max")
        return update
