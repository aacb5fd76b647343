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
from typing import ClassVar, NamedTuple

from optplan.planner.dtypes import Dtype
from optplan.planner.optimizers.adapprox_chunks import write_chunked_step
from optplan.planner.optimizers.adapprox_layout import (
    MAX_KERNEL_RANK,
    MatrixLayout,
    matrix_table_bytes,
    table_places,
    vector_scratch_bytes,
    vector_table_bytes,
    waves,
)
from optplan.planner.optimizers.adapprox_paper import PASSES, write_paper_step
from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel, itemsize
from optplan.planner.optimizers.options import Option
from optplan.planner.optimizers.parts import like_parameter, step_counter, tensor
from optplan.planner.optimizers.scratch import Scratch
from optplan.planner.tensors import Parameter, StateTensor
from optplan.planner.timeline import TimelineBuilder

MIN_RANK = 1
MAX_RANK_DIVISOR = 4
DEFAULT_RANK = 32
"""Rank that the optimizer class takes by default; the planner's default is what an adaptive rank must reserve."""


def matrix_shape(parameter: Parameter) -> tuple[int, int] | None:
    """Rows and columns in which a parameter is factored, or None if its second moment is kept whole."""
    if len(parameter.shape) < 2:
        return None
    rows, columns = parameter.shape[0], math.prod(parameter.shape[1:])
    return (rows, columns) if min(rows, columns) >= 2 else None


def max_rank(rows: int, columns: int) -> int:
    """The rank at which the adaptation stops."""
    return max(MIN_RANK, min(rows, columns) // MAX_RANK_DIVISOR)


class _Round(NamedTuple):
    """What one round of launches takes."""

    name: str
    table_bytes: int
    scratch_bytes: int


class Adapprox(OptimizerModel):
    """Our Adapprox: the first moment in the state dtype, the second always in fp32, where 0.999 of it is not itself."""

    OPTIONS = (
        Option(
            "rank", "integer", "max", "rank of the factors, at most a quarter of the smaller side: "
            "min is the least training can reach, max what the paper's adaptive rank must reserve; the optimizer class "
            "takes 32 by default", low=1, high=2**20, choices=("min", "max"),
        ),
        Option("beta1", "number", 0.9, "decay of the first moment; 0 keeps none", low=0, high=1, high_exclusive=True),
        Option(
            "mode", "text", "fast", "fast never forms the second moment; paper forms it and multiplies by it ten times",
            choices=("fast", "paper"),
        ),
    )  # fmt: skip
    STATE_DTYPES: ClassVar[tuple[Dtype, ...]] = ("float32", "bfloat16")

    def variants(self) -> dict[str, OptimizerModel]:
        """The least state that training can reach, that of the class's default rank, and what must be reserved."""
        ranks = {
            "best case (rank=min)": "min",
            f"the class's default (rank={DEFAULT_RANK})": DEFAULT_RANK,
            "reserved (rank=max)": "max",
        }
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
        """Step counter, first moment if any, and the second moment in fp32: two factors or whole."""
        dtype, shape, rank = self.state_dtype(context), matrix_shape(parameter), self.rank(parameter)
        first = [like_parameter("exp_avg", parameter, dtype)] * bool(self.options["beta1"])
        if shape is None:
            return (step_counter("cpu"), *first, like_parameter("exp_avg_sq", parameter, "float32"))
        why = f"rank {rank} of at most {max_rank(*shape)}"
        q_factor = tensor("q_factor", (shape[0], rank), "float32", why=why)
        return (step_counter("cpu"), *first, q_factor, tensor("u_factor", (shape[1], rank), "float32", why=why))

    def write_step(self, timeline: TimelineBuilder, parameters: Sequence[Parameter], context: OptimizerContext) -> None:
        """One buffer of launch tables, and the scratch of each round of matrices and of all vectors.

        Factors of more than `MAX_KERNEL_RANK` columns are worked on in plain torch, a chunk of rows at a time. The
        paper's mode forms the second moment of one matrix after the other, in plain torch.
        """
        scratch = Scratch(timeline)
        kinds: dict[str, list[Parameter]] = {}
        for p in parameters:
            if p.numel:
                kinds.setdefault(self._kind(p), []).append(p)
        rounds = {kind: self._rounds(kind, members) for kind, members in kinds.items()}
        tables = [r.table_bytes for of_kind in rounds.values() for r in of_kind]
        if tables:
            scratch.bind("tables", scratch.alloc("all tensors", ("launch tables", table_places(tables)[1])))
        left = len(tables)
        for kind, members in kinds.items():
            for r in rounds[kind]:
                scratch.passing(r.name, ("sketches, partial sums and Gram matrices", r.scratch_bytes))
                left -= 1
                if not left:
                    scratch.drop("tables")
            for p in members if not rounds[kind] else ():
                self._write_in_torch(scratch, p, context)

    def _kind(self, p: Parameter) -> str:
        if matrix_shape(p) is None:
            return "vectors"
        if self.options["mode"] == "paper":
            return "paper"
        return "matrices" if self.rank(p) <= MAX_KERNEL_RANK else "chunks"

    def _layout(self, p: Parameter) -> MatrixLayout:
        shape = matrix_shape(p)
        assert shape is not None
        return MatrixLayout(*shape, self.rank(p))

    def _rounds(self, kind: str, members: Sequence[Parameter]) -> list[_Round]:
        """What kernels work on together; nothing where the members are worked on in torch."""
        if kind == "vectors":
            numels = [p.numel for p in members]
            return [_Round(kind, vector_table_bytes(numels), vector_scratch_bytes(numels))]
        if kind != "matrices":
            return []
        layouts = [self._layout(p) for p in members]
        found = []
        for number, places in enumerate(waves(layouts), start=1):
            wave = [layouts[place] for place in places]
            size = sum(layout.scratch_bytes() for layout in wave)
            found.append(_Round(f"round {number} of matrices", matrix_table_bytes(wave), size))
        return found

    def _write_in_torch(self, scratch: Scratch, p: Parameter, context: OptimizerContext) -> None:
        if self.options["mode"] != "paper":
            write_chunked_step(scratch, p, self._layout(p), context)
            return
        momentum = bool(self.options["beta1"])
        dtypes = {"gradient": context.gradient_dtype, "weights": context.parameter_dtype}
        if momentum:
            dtypes["first moment"] = self.state_dtype(context)
        converted = frozenset(what for what, dtype in dtypes.items() if dtype != "float32")
        write_paper_step(scratch, p, self._layout(p), converted=converted, momentum=momentum)

    def moved_bytes(self, parameter: Parameter, context: OptimizerContext) -> int:
        """The default; for a matrix also a second reading of the gradient and of the factors, or the second moment."""
        moved = super().moved_bytes(parameter, context)
        if matrix_shape(parameter) is None:
            return moved
        if self.options["mode"] == "paper":
            moved += parameter.numel * PASSES * itemsize("float32")
        else:
            factors = [t for t in self.state(parameter, context) if t.name in ("q_factor", "u_factor")]
            moved += parameter.numel * itemsize(context.gradient_dtype) + sum(t.num_bytes for t in factors)
        return moved
