"""CAME, as came_pytorch implements it: a factored second moment and a factored confidence, fp32 throughout.

Source: arXiv 2307.02047; came_pytorch 0.1.3 `CAME.py`. The first moment is kept whatever `betas` say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel, itemsize
from optplan.planner.optimizers.parts import like_parameter, tensor
from optplan.planner.optimizers.reduction import write_column_reduction, write_whole_reduction
from optplan.planner.optimizers.scratch import Scratch
from optplan.planner.tensors import Parameter, StateTensor
from optplan.planner.timeline import TimelineBuilder

_FP32_BYTES = 4


def _is_factored(parameter: Parameter) -> bool:
    return len(parameter.shape) >= 2


class Came(OptimizerModel):
    """`came_pytorch.CAME`: the last two dimensions are factored, vectors keep a whole second moment."""

    def state(self, parameter: Parameter, context: OptimizerContext) -> tuple[StateTensor, ...]:
        """First moment, row and column statistics of gradient and confidence, the RMS in the parameter's dtype."""
        dtype, shape = self.state_dtype(context, own="float32"), parameter.shape
        tensors = [like_parameter("exp_avg", parameter, dtype)]
        if _is_factored(parameter):
            for kind in ("sq", "res"):
                tensors.append(tensor(f"exp_avg_{kind}_row", shape[:-1], dtype, why="one a row"))
                tensors.append(tensor(f"exp_avg_{kind}_col", shape[:-2] + shape[-1:], dtype, why="one a column"))
        else:
            tensors.append(like_parameter("exp_avg_sq", parameter, dtype))
        return (*tensors, tensor("RMS", (), context.parameter_dtype, why="of the parameter"))

    def moved_bytes(self, parameter: Parameter, context: OptimizerContext) -> int:
        """The default and what the statistics force: gradient twice more, parameter and first moment once more."""
        width = 2 * itemsize(context.gradient_dtype) + itemsize(context.parameter_dtype) + _FP32_BYTES
        return super().moved_bytes(parameter, context) + parameter.numel * width

    def write_step(self, timeline: TimelineBuilder, parameters: Sequence[Parameter], context: OptimizerContext) -> None:
        """An fp32 gradient, the update and the residual; those of the last tensor live on into the next turn."""
        scratch = Scratch(timeline)
        for p in parameters:
            self._write_tensor(scratch, p, context)
        scratch.close()

    def _write_tensor(self, scratch: Scratch, p: Parameter, context: OptimizerContext) -> None:
        size = p.numel * _FP32_BYTES
        scratch.drop("grad")
        if itemsize(context.gradient_dtype) < _FP32_BYTES:
            scratch.assign("grad", p, ("fp32 copy of the gradient", size))
        scratch.free(_write_rms(scratch, p, itemsize(context.parameter_dtype)))  # in the place of the old RMS
        scratch.assign("update", p, ("squared gradient", size), ("squared gradient plus eps", size))
        self._write_second_moment(scratch, p)
        rms = _write_rms(scratch, p, _FP32_BYTES)
        clipping = scratch.alloc(p, ("clipping factor", _FP32_BYTES))
        scratch.free(rms, clipping)
        residual = (("residual", size), ("squared residual", size), ("squared residual plus eps", size))
        scratch.assign("res", p, *residual)
        self._write_confidence(scratch, p)
        scratch.passing(p, ("negated update", size))

    def _write_second_moment(self, scratch: Scratch, p: Parameter) -> None:
        if _is_factored(p):
            _write_means(scratch, p)
            scratch.bind("update", _write_outer_product(scratch, p))
        else:
            scratch.assign("update", p, ("update", p.numel * _FP32_BYTES))

    def _write_confidence(self, scratch: Scratch, p: Parameter) -> None:
        if _is_factored(p):
            _write_means(scratch, p)
            scratch.bind("res_approx", _write_outer_product(scratch, p))
            scratch.drop("update")  # now another name for `res_approx`
        else:
            scratch.assign("update", p, ("copy of the first moment", p.numel * _FP32_BYTES))


def _write_rms(scratch: Scratch, p: Parameter, width: int) -> int:
    """A norm over the root of the number of elements; returns the id of the quotient."""
    norm = write_whole_reduction(scratch, p, ("norm", width))
    rms = scratch.alloc(p, ("RMS", width))
    scratch.free(norm)
    return rms


def _write_means(scratch: Scratch, p: Parameter) -> None:
    """Means over the columns and over the rows, each added to its statistic at once."""
    rows, columns = p.shape[-2:]
    scratch.passing(p, ("row means", p.numel // columns * _FP32_BYTES))
    scratch.free(write_column_reduction(scratch, p, ("column means", p.numel // rows * _FP32_BYTES)))


def _write_outer_product(scratch: Scratch, p: Parameter) -> int:
    """The full-size estimate from its row and column factors; returns its id."""
    rows, columns = p.shape[-2:]
    row_factor = scratch.chain(
        p,
        ("mean of the row statistic", math.prod(p.shape[:-2]) * _FP32_BYTES),
        ("row factor", p.numel // columns * _FP32_BYTES),
    )
    column_factor = scratch.alloc(p, ("column factor", p.numel // rows * _FP32_BYTES))
    product = scratch.alloc(p, ("outer product", p.numel * _FP32_BYTES))
    scratch.free(row_factor, column_factor)
    return product
