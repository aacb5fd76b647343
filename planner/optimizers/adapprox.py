"""Adapprox: the second moment as a product of rank k, its rank adapted between 1 and a quarter of the smaller side.

Zhao et al. 2024, arXiv 2403.14958; no public code exists. A matrix keeps Q `[rows, k]` and U `[columns, k]`, a tensor
of more dimensions is taken as `[first, rest]`, a vector (or a matrix with one row or column) keeps its whole second
moment. The rank moves during training, so there are three answers: the least (`rank=min`), what must be reserved
(`rank=max`), a given one. The kernels warm-start the range finder with the last U, need no oversampling columns, and
read the gradient twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from optplan.planner.dtypes import Dtype
from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel, itemsize
from optplan.planner.optimizers.launch import write_launch_table
from optplan.planner.optimizers.options import Option
from optplan.planner.optimizers.parts import like_parameter, step_counter, tensor
from optplan.planner.optimizers.scratch import Scratch
from optplan.planner.tensors import Parameter, StateTensor
from optplan.planner.timeline import TimelineBuilder

MIN_RANK = 1
MAX_RANK_DIVISOR = 4
_FP32_BYTES = 4


def matrix_shape(parameter: Parameter) -> tuple[int, int] | None:
    """Rows and columns in which a parameter is factored, or None if its second moment is kept whole."""
    if len(parameter.shape) < 2:
        return None
    rows, columns = parameter.shape[0], math.prod(parameter.shape[1:])
    return (rows, columns) if min(rows, columns) >= 2 else None


def max_rank(rows: int, columns: int) -> int:
    """The rank at which the adaptation stops."""
    return max(MIN_RANK, min(rows, columns) // MAX_RANK_DIVISOR)


class Adapprox(OptimizerModel):
    """Our Adapprox: factors in the state dtype, worked on in fp32."""

    OPTIONS = (
        Option(
            "rank", "integer", "max", "rank of the factors, at most a quarter of the smaller side: "
            "min is the least training can reach, max what it must reserve", low=1, high=2**20, choices=("min", "max"),
        ),
        Option("beta1", "number", 0.9, "decay of the first moment; 0 keeps none", low=0, high=1, high_exclusive=True),
    )  # fmt: skip
    STATE_DTYPES: ClassVar[tuple[Dtype, ...]] = ("float32", "bfloat16")

    def variants(self) -> dict[str, OptimizerModel]:
        """The least state that training can reach, and what it must reserve."""
        ranks = {"best case (rank=min)": "min", "reserved (rank=max)": "max"}
        return {
            title: type(self)(self.id, self.implementation, self.options | {"rank": rank})
            for title, rank in ranks.items()
        }

    def rank(self, parameter: Parameter) -> int:
        """The rank of a parameter's factors, 0 for one whose second moment is kept whole."""
        shape, rank = matrix_shape(parameter), self.options["rank"]
        if shape is None:
            return 0
        largest = max_rank(*shape)
        return {"min": MIN_RANK, "max": largest}.get(rank) or min(rank, largest)

    def state(self, parameter: Parameter, context: OptimizerContext) -> tuple[StateTensor, ...]:
        """Step counter, first moment if any, and the second moment: two factors or whole."""
        dtype, shape, rank = self.state_dtype(context), matrix_shape(parameter), self.rank(parameter)
        first = [like_parameter("exp_avg", parameter, dtype)] * bool(self.options["beta1"])
        if shape is None:
            return (step_counter("cpu"), *first, like_parameter("exp_avg_sq", parameter, dtype))
        why = f"rank {rank} of at most {max_rank(*shape)}"
        q_factor = tensor("q_factor", (shape[0], rank), dtype, why=why)
        return (step_counter("cpu"), *first, q_factor, tensor("u_factor", (shape[1], rank), dtype, why=why))

    def write_step(self, timeline: TimelineBuilder, parameters: Sequence[Parameter], context: OptimizerContext) -> None:
        """The launch table, and matrix by matrix the new factors in fp32 with their Gram matrices."""
        del context
        table, scratch = write_launch_table(timeline, parameters, num_lists=5), Scratch(timeline)
        for p in parameters:
            self._write_matrix(scratch, p)
        scratch.close()
        scratch.free(table)

    def _write_matrix(self, scratch: Scratch, p: Parameter) -> None:
        shape, rank = matrix_shape(p), self.rank(p)
        if shape is None:
            return
        rows, columns = shape
        core = scratch.alloc(p, ("product of U and the sketch", rank * rank * _FP32_BYTES))
        sketch = scratch.alloc(p, ("new Q", rows * rank * _FP32_BYTES))
        scratch.free(core)
        for _ in range(2):  # Cholesky-QR twice
            gram = scratch.alloc(p, ("Gram matrix of Q", rank * rank * _FP32_BYTES))
            scratch.passing(p, ("Cholesky factor", rank * rank * _FP32_BYTES))
            scratch.free(gram)
        core = scratch.alloc(p, ("product of the old and the new Q", rank * rank * _FP32_BYTES))
        projection = scratch.alloc(p, ("new U", columns * rank * _FP32_BYTES))
        scratch.free(core, sketch, projection)

    def moved_bytes(self, parameter: Parameter, context: OptimizerContext) -> int:
        """The default, and for a matrix a second reading of the gradient and of the factors."""
        moved = super().moved_bytes(parameter, context)
        if matrix_shape(parameter) is not None:
            factors = [t for t in self.state(parameter, context) if t.name in ("q_factor", "u_factor")]
            moved += parameter.numel * itemsize(context.gradient_dtype) + sum(t.num_bytes for t in factors)
        return moved
