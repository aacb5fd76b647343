"""APOLLO AdamW, as apollo_torch implements it: gradients scaled by what AdamW would do in a random projection.

Source: arXiv 2412.05270; apollo_torch 1.0.3 `apollo.py` and `random_projector.py` (`proj="random"`, `proj_type="std"`).
The package stores the random projector, although the paper would draw it again from a seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel, itemsize
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
from optplan.planner.optimizers.reduction import write_reduction_buffers
from optplan.planner.optimizers.scratch import Scratch
from optplan.planner.reductions import column_reduction_bytes, whole_reduction_bytes
from optplan.planner.tensors import Parameter, StateTensor
from optplan.planner.timeline import TimelineBuilder

_FP32_BYTES = 4


class ApolloAdamW(OptimizerModel):
    """`apollo_torch.APOLLOAdamW`: a projector, two projected moments and a norm for each projected matrix.

    APOLLO-Mini is rank 1 with one scale a tensor.
    """

    OPTIONS = (
        Option("rank", "integer", 256, "rows or columns kept of a gradient; beyond its shorter side it adds", low=1),
        Option(
            "scale_type", "text", "channel", "one scale a channel, or one a tensor (APOLLO-Mini, with rank 1)",
            choices=("channel", "tensor"),
        ),
        TARGET,
    )  # fmt: skip

    def state(self, parameter: Parameter, context: OptimizerContext) -> tuple[StateTensor, ...]:
        """Projector, projected moments and the norm of the last update, or AdamW's moments."""
        dtype = self.state_dtype(context, own=context.gradient_dtype)
        if not is_projected(parameter, self.options["target"]):
            return dense_state(parameter, context)
        rank, (rows, columns) = self.options["rank"], parameter.shape
        shape = (rank, columns) if rows >= columns else (rows, rank)
        low = low_rank_shape(parameter, rank)
        return (
            tensor("projector.ortho_matrix", shape, dtype, why="random projector"),
            *(tensor(name, low, dtype, why="projected") for name in ("exp_avg", "exp_avg_sq")),
            tensor("scaled_grad", (), dtype, why="norm of the last update"),
        )

    def unsupported_reason(self, parameters: Sequence[Parameter], context: OptimizerContext) -> str | None:
        """Trainers refuse a model in which nothing matches."""
        del context
        return none_projected(self.id, self.options["target"], parameters)

    def moved_bytes(self, parameter: Parameter, context: OptimizerContext) -> int:
        """The default with the projector only read, and the gradient once more: it is scaled after its projection."""
        moved = super().moved_bytes(parameter, context)
        if is_projected(parameter, self.options["target"]):
            moved -= unmoved_bytes(self.state(parameter, context)[0])
            moved += parameter.numel * itemsize(context.gradient_dtype)
        return moved

    def write_step(self, timeline: TimelineBuilder, parameters: Sequence[Parameter], context: OptimizerContext) -> None:
        """A step that renews the projectors (one in 200 by default): of all steady steps it allocates most."""
        scratch = Scratch(timeline)
        write = partial(self._write_matrix, context=context)
        write_loop(scratch, parameters, context, write, target=self.options["target"])

    def _write_matrix(self, scratch: Scratch, p: Parameter, *, context: OptimizerContext) -> None:
        scratch.drop("grad")
        self._write_projector(scratch, p, context)
        width = itemsize(context.gradient_dtype)
        rows, columns = low_rank_shape(p, self.options["rank"])
        low = rows * columns * width
        scratch.assign("grad", p, ("projected gradient", low))
        write_direction(scratch, p, low)
        self._write_scales(scratch, p, width)
        scratch.assign("scaled_grad", p, ("scaled gradient", p.numel * width))
        self._write_limiter(scratch, p, width)
        scratch.drop("norm_grad")

    def _write_projector(self, scratch: Scratch, p: Parameter, context: OptimizerContext) -> None:
        """A new random matrix, drawn in fp32; it takes the place of the old one, which dies."""
        numel = min(p.shape) * self.options["rank"]
        draw = [("random matrix", numel * _FP32_BYTES), ("scaled random matrix", numel * _FP32_BYTES)]
        if context.gradient_dtype != "float32":
            scratch.assign("matrix", p, ("fp32 copy of the gradient", p.numel * _FP32_BYTES))
            draw.append(("new projector", numel * itemsize(context.gradient_dtype)))
        projector = scratch.chain(p, *draw)
        scratch.drop("matrix")
        scratch.free(projector)

    def _write_scales(self, scratch: Scratch, p: Parameter, width: int) -> None:
        """The ratio of two norms of the projected gradient, a channel or the tensor."""
        rows, columns = low_rank_shape(p, self.options["rank"])
        by_channel = self.options["scale_type"] == "channel"
        size = max(p.shape) * width if by_channel else width
        norms = []
        for what in ("norm of the direction", "norm of the projected gradient"):
            norms.append(scratch.alloc(p, (what, size)))
            if not by_channel:
                write_reduction_buffers(scratch, p, whole_reduction_bytes(rows * columns))
            elif p.shape[0] < p.shape[1]:
                write_reduction_buffers(scratch, p, column_reduction_bytes(rows, columns))
        divisor = scratch.alloc(p, ("divisor", size))
        scratch.free(norms[1])
        scale = scratch.alloc(p, ("scale", size))
        scratch.free(norms[0], divisor)
        scratch.bind("grad_scaling_factor", scale)

    def _write_limiter(self, scratch: Scratch, p: Parameter, width: int) -> None:
        """The limit on the update's growth: a second scaled gradient, and a new norm in the place of the old one."""
        norm = scratch.alloc(p, ("norm of the scaled gradient", width))
        write_reduction_buffers(scratch, p, whole_reduction_bytes(p.numel))
        scratch.bind("scaled_grad_norm", norm)
        growth = scratch.chain(p, ("old norm", width), ("growth", width))
        scratch.passing(p, ("comparison", 1))
        scratch.free(growth)
        scratch.assign("scaled_grad", p, ("limited gradient", p.numel * width))
        scratch.passing(p, ("new norm", width))
