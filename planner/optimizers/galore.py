"""GaLore AdamW, as galore_torch implements it: Adam's moments live in the space of a projected gradient.

Source: arXiv 2403.03507; galore_torch 1.0 `adamw.py` and `galore_projector.py` (`proj_type="std"`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel, itemsize
from optplan.planner.optimizers.linalg import write_svd
from optplan.planner.optimizers.low_rank import (
    TARGET,
    dense_state,
    is_projected,
    low_rank_shape,
    none_projected,
    unmoved_bytes,
    write_direction,
    write_loop,
)
from optplan.planner.optimizers.options import Option
from optplan.planner.optimizers.parts import tensor
from optplan.planner.optimizers.scratch import Scratch
from optplan.planner.tensors import Parameter, StateTensor
from optplan.planner.timeline import TimelineBuilder

_FP32_BYTES = 4


class GaLoreAdamW(OptimizerModel):
    """`galore_torch.GaLoreAdamW`: a projector and two projected moments for each projected matrix, AdamW for the rest.

    With fp32 gradients the package keeps the projector as a view, so the whole factor of the decomposition stays
    allocated; `compact_projector` plans for a copy instead.
    """

    OPTIONS = (
        Option("rank", "integer", 128, "rows or columns kept of a gradient, at most its shorter side", low=1),
        TARGET,
        Option("compact_projector", "boolean", False, "a copied projector, not a view of the whole SVD factor (fp32)"),
    )

    def state(self, parameter: Parameter, context: OptimizerContext) -> tuple[StateTensor, ...]:
        """Projector and projected moments, or AdamW's moments."""
        dtype = self.state_dtype(context, own=context.gradient_dtype)
        if not is_projected(parameter, self.options["target"]):
            return dense_state(parameter, context)
        rank, (rows, columns) = self._rank(parameter), parameter.shape
        shape = (rank, columns) if rows >= columns else (rows, rank)
        retained = None if self._is_copied(context) else min(parameter.shape) ** 2
        why = "projector" if retained is None else "projector, a view of the whole SVD factor"
        projector = tensor("projector.ortho_matrix", shape, dtype, why=why, storage=retained)
        low = low_rank_shape(parameter, rank)
        return (projector, *(tensor(name, low, dtype, why="projected") for name in ("exp_avg", "exp_avg_sq")))

    def _rank(self, parameter: Parameter) -> int:
        return int(min(self.options["rank"], *parameter.shape))

    def _is_copied(self, context: OptimizerContext) -> bool:
        # A 16-bit projector is a copy anyway: the decomposition is fp32 and its factor is cast.
        return context.gradient_dtype != "float32" or bool(self.options["compact_projector"])

    def moved_bytes(self, parameter: Parameter, context: OptimizerContext) -> int:
        """The default for a step between two decompositions, in which the projector is only read."""
        moved = super().moved_bytes(parameter, context)
        if is_projected(parameter, self.options["target"]):
            moved -= unmoved_bytes(self.state(parameter, context)[0])
        return moved

    def unsupported_reason(self, parameters: Sequence[Parameter], context: OptimizerContext) -> str | None:
        """Trainers refuse a model in which nothing matches."""
        del context
        return none_projected(self.id, self.options["target"], parameters)

    def write_step(self, timeline: TimelineBuilder, parameters: Sequence[Parameter], context: OptimizerContext) -> None:
        """A step that renews the projectors (one in 200 by default): of all steady steps it allocates most."""
        scratch = Scratch(timeline)
        write = partial(self._write_matrix, context=context)
        write_loop(scratch, parameters, context, write, target=self.options["target"])

    def _write_matrix(self, scratch: Scratch, p: Parameter, *, context: OptimizerContext) -> None:
        scratch.drop("grad")
        self._write_projector(scratch, p, context)
        width = itemsize(context.gradient_dtype)
        rows, columns = low_rank_shape(p, self._rank(p))
        low = rows * columns * width
        scratch.assign("grad", p, ("projected gradient", low))
        write_direction(scratch, p, low)
        back = ("direction projected back", p.numel * width)
        scratch.assign("norm_grad", p, back, ("scaled direction", back[1]))

    def _write_projector(self, scratch: Scratch, p: Parameter, context: OptimizerContext) -> None:
        """The decomposition of the gradient in fp32; the new projector takes the place of the old one, which dies."""
        rank, (rows, columns) = self._rank(p), p.shape
        if context.gradient_dtype != "float32":
            scratch.assign("matrix", p, ("fp32 copy of the gradient", p.numel * _FP32_BYTES))
        factors = write_svd(scratch, p, rows=rows, columns=columns)
        diagonal = scratch.alloc(p, ("diagonal of the singular values", rank * rank * _FP32_BYTES))
        other = scratch.alloc(p, ("other factor, scaled", max(p.shape) * rank * _FP32_BYTES))
        scratch.free(diagonal)
        if self._is_copied(context):
            size = min(p.shape) * rank * itemsize(context.gradient_dtype)
            scratch.assign("new", p, ("new projector", size))
        scratch.drop("matrix")
        scratch.free(*factors, other)
        scratch.drop("new")
