"""Adafactor: torch's and transformers' implementations, both factored over the last two dimensions.

Sources: torch 2.13 `optim/_adafactor.py`; transformers 5.23 `optimization.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel, itemsize
from optplan.planner.optimizers.options import Option
from optplan.planner.optimizers.parts import like_parameter, step_counter, tensor
from optplan.planner.optimizers.reduction import write_column_reduction, write_reduction_buffers, write_whole_reduction
from optplan.planner.optimizers.scratch import Scratch
from optplan.planner.reductions import row_reduction_bytes
from optplan.planner.tensors import Parameter, StateTensor
from optplan.planner.timeline import TimelineBuilder

_FP32_BYTES = 4


def _is_factored(parameter: Parameter) -> bool:
    return len(parameter.shape) >= 2


def _statistics_bytes(parameter: Parameter, width: int) -> tuple[int, int, int]:
    """Bytes of the row statistics, of the column statistics and of a mean over either."""
    *batch, rows, columns = parameter.shape
    unit = math.prod(batch) * width
    return unit * rows, unit * columns, unit


def _write_mean_of_rows(scratch: Scratch, p: Parameter, num_bytes: int, what: str) -> int:
    """The mean over the row statistics of each matrix; returns its id."""
    mean = scratch.alloc(p, (f"mean of {what}", num_bytes))
    write_reduction_buffers(scratch, p, row_reduction_bytes(math.prod(p.shape[:-2]), p.shape[-2]))
    return mean


def _moved_bytes(model: OptimizerModel, parameter: Parameter, context: OptimizerContext) -> int:
    """Gradient read for the statistics, the update's norm and the update; the parameter read for its norm too."""
    base = OptimizerModel.moved_bytes(model, parameter, context)
    return base + parameter.numel * (2 * itemsize(context.gradient_dtype) + itemsize(context.parameter_dtype))


class TorchAdafactor(OptimizerModel):
    """`torch.optim.Adafactor`: a row and a column of statistics in the gradient's dtype, a vector's kept whole."""

    OPTIONS = (Option("foreach", "boolean", False, "update the whole group at once: a copy of its gradients"),)

    def state(self, parameter: Parameter, context: OptimizerContext) -> tuple[StateTensor, ...]:
        """Row and column statistics of a matrix, all of a vector's."""
        dtype, shape = self.state_dtype(context, own=context.gradient_dtype), parameter.shape
        if not _is_factored(parameter):
            return (step_counter("cpu"), like_parameter("variance", parameter, dtype))
        row = tensor("row_var", (*shape[:-1], 1), dtype, why="one a row")
        column = tensor("col_var", (*shape[:-2], 1, shape[-1]), dtype, why="one a column")
        return (step_counter("cpu"), row, column)

    def unsupported_reason(self, parameters: Sequence[Parameter], context: OptimizerContext) -> str | None:
        """Torch divides a norm by the root of the number of elements."""
        del context
        empty = next((p.name for p in parameters if not p.numel), None)
        return f"torch's Adafactor divides by zero on the empty tensor {empty}" if empty else None

    def moved_bytes(self, parameter: Parameter, context: OptimizerContext) -> int:
        """Three passes over the gradient, see `_moved_bytes`."""
        return _moved_bytes(self, parameter, context)

    def write_step(self, timeline: TimelineBuilder, parameters: Sequence[Parameter], context: OptimizerContext) -> None:
        """Norms and the update of one tensor beside the last update, or of a whole group."""
        scratch, width = Scratch(timeline), itemsize(context.gradient_dtype)
        if self.options["foreach"]:
            groups: dict[bool, list[Parameter]] = {}  # matrices and vectors, in the order in which they turn up
            for p in parameters:
                groups.setdefault(_is_factored(p), []).append(p)
            for group in groups.values():
                self._write_group(scratch, group, width)
        else:
            for p in parameters:
                self._write_tensor(scratch, p, width)
        scratch.close()

    def _write_tensor(self, scratch: Scratch, p: Parameter, width: int) -> None:
        size = p.numel * width
        scratch.free(write_whole_reduction(scratch, p, ("norm", width)))
        if _is_factored(p):
            rows, columns, mean = _statistics_bytes(p, width)
            scratch.assign("row_mean", p, ("row norms", rows))
            scratch.bind("col_mean", write_column_reduction(scratch, p, ("column norms", columns)))
            update = scratch.alloc(p, ("update", size))
            scratch.free(_write_mean_of_rows(scratch, p, mean, "row_var"))
        else:
            scratch.assign("grad_squared", p, ("squared gradient", size))
            update = scratch.alloc(p, ("update", size))
        scratch.bind("update", update)
        scratch.free(write_whole_reduction(scratch, p, ("norm of the update", width)))

    def _write_group(self, scratch: Scratch, group: Sequence[Parameter], width: int) -> None:
        def write_all(what: str, sizes: Sequence[int]) -> list[int]:
            return [scratch.alloc(p, (what, size)) for p, size in zip(group, sizes, strict=True)]

        full = [p.numel * width for p in group]
        for p in group:
            scratch.free(write_whole_reduction(scratch, p, ("norm", width)))
        if _is_factored(group[0]):
            rows, columns, means = zip(*(_statistics_bytes(p, width) for p in group), strict=True)
            scratch.free(*write_all("row norms", rows))
            norms = zip(group, columns, strict=True)
            scratch.free(*[write_column_reduction(scratch, p, ("column norms", size)) for p, size in norms])
            updates = write_all("update", full)
            each = zip(group, means, strict=True)
            scratch.free(*[_write_mean_of_rows(scratch, p, size, "row_var") for p, size in each])
        else:
            scratch.free(*write_all("squared gradient", full))
            updates = write_all("update", full)
        scratch.bind("updates", *updates)
        for p in group:
            scratch.free(write_whole_reduction(scratch, p, ("norm of the update", width)))


class HfAdafactor(OptimizerModel):
    """transformers' `Adafactor`: fp32 state whatever the parameters are; it works on fp32 copies of 16-bit tensors."""

    OPTIONS = (
        Option(
            "beta1", "number", "none", "decay of a first moment, kept with any number", low=0, high=1,
            high_exclusive=True, choices=("none",),
        ),
    )  # fmt: skip

    @property
    def _has_first_moment(self) -> bool:
        return bool(self.options["beta1"] != "none")

    def state(self, parameter: Parameter, context: OptimizerContext) -> tuple[StateTensor, ...]:
        """First moment if any, row and column statistics of a matrix, all of a vector's, and the RMS."""
        dtype, shape = self.state_dtype(context, own="float32"), parameter.shape
        tensors = [like_parameter("exp_avg", parameter, dtype)] * self._has_first_moment
        if _is_factored(parameter):
            tensors.append(tensor("exp_avg_sq_row", shape[:-1], dtype, why="one a row"))
            tensors.append(tensor("exp_avg_sq_col", shape[:-2] + shape[-1:], dtype, why="one a column"))
        else:
            tensors.append(like_parameter("exp_avg_sq", parameter, dtype))
        return (*tensors, tensor("RMS", (), dtype, why="of the parameter"))

    def moved_bytes(self, parameter: Parameter, context: OptimizerContext) -> int:
        """Three passes over the gradient, see `_moved_bytes`."""
        return _moved_bytes(self, parameter, context)

    def write_step(self, timeline: TimelineBuilder, parameters: Sequence[Parameter], context: OptimizerContext) -> None:
        """fp32 copies of 16-bit tensors, the squared gradient, the update and its negation."""
        scratch = Scratch(timeline)
        for p in parameters:
            self._write_tensor(scratch, p, context)
        scratch.close()

    def _write_tensor(self, scratch: Scratch, p: Parameter, context: OptimizerContext) -> None:
        size, one = p.numel * _FP32_BYTES, _FP32_BYTES
        self._write_copies(scratch, p, context)
        norm = write_whole_reduction(scratch, p, ("norm", one))
        rms = scratch.alloc(p, ("new RMS", one))
        scratch.free(norm, rms)  # takes the place of the old RMS, which dies
        scratch.assign("update", p, ("squared gradient", size), ("update", size))
        if _is_factored(p):
            self._write_factored(scratch, p)
        else:
            scratch.assign("update", p, ("update", size))
        norm = write_whole_reduction(scratch, p, ("norm of the update", one))
        rms = scratch.alloc(p, ("RMS of the update", one))
        scratch.free(norm)
        scratch.passing(p, ("clipping factor", one))
        scratch.free(rms)
        if self._has_first_moment:
            scratch.drop("update")
        scratch.passing(p, ("negated update", size))

    def _write_copies(self, scratch: Scratch, p: Parameter, context: OptimizerContext) -> None:
        size = p.numel * _FP32_BYTES
        scratch.drop("grad")  # both names are bound to 16-bit tensors before they are bound to the copies
        if itemsize(context.gradient_dtype) < _FP32_BYTES:
            scratch.assign("grad", p, ("fp32 copy of the gradient", size))
        scratch.drop("p_data_fp32")
        if itemsize(context.parameter_dtype) < _FP32_BYTES:
            scratch.assign("p_data_fp32", p, ("fp32 copy", size))

    def _write_factored(self, scratch: Scratch, p: Parameter) -> None:
        rows, columns, mean = _statistics_bytes(p, _FP32_BYTES)
        scratch.passing(p, ("row means", rows))
        scratch.free(write_column_reduction(scratch, p, ("column means", columns)))
        row_mean = _write_mean_of_rows(scratch, p, mean, "exp_avg_sq_row")
        scratch.assign("r_factor", p, ("row factor", rows))
        scratch.free(row_mean)
        scratch.assign("c_factor", p, ("column factor", columns))
        update = scratch.alloc(p, ("update", p.numel * _FP32_BYTES))
        scratch.drop("r_factor", "c_factor")
        scratch.bind("update", update)
