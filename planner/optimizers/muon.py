"""Muon as torch implements it, with fused AdamW for what Muon does not take.

Muon orthogonalizes the momentum of hidden matrices. Its documentation leaves everything else to a standard method; here
embeddings, the output head, and every tensor that is not a matrix (norms, biases, convolutions, stacked experts) go to
`torch.optim.AdamW(fused=True)`. A parameter's role decides, never its name.

Source: torch 2.13 `optim/_muon.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from optplan.planner.optimizers.adamw import AMSGRAD, FusedAdamW
from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel, itemsize
from optplan.planner.optimizers.options import Option
from optplan.planner.optimizers.parts import like_parameter
from optplan.planner.optimizers.reduction import write_whole_reduction
from optplan.planner.optimizers.scratch import Scratch
from optplan.planner.tensors import Parameter, StateTensor
from optplan.planner.timeline import TimelineBuilder

NUM_ITERATIONS = 5
"""Newton-Schulz iterations, torch's default."""

_BF16_BYTES = 2
_NOT_HIDDEN = frozenset({"token_embedding", "position_embedding", "output_head"})


def is_hidden_matrix(parameter: Parameter) -> bool:
    """Whether a parameter goes to Muon: a matrix that is neither an embedding nor the output head."""
    return len(parameter.shape) == 2 and parameter.role not in _NOT_HIDDEN


class Muon(OptimizerModel):
    """One momentum for a hidden matrix; AdamW's state for the rest."""

    OPTIONS = (Option("nesterov", "boolean", True, "Nesterov momentum; false saves the copy of the gradient"),)

    def state(self, parameter: Parameter, context: OptimizerContext) -> tuple[StateTensor, ...]:
        """The momentum of a hidden matrix; AdamW's tensors otherwise."""
        if not is_hidden_matrix(parameter):
            return self._adamw.state(parameter, context)
        dtype = self.state_dtype(context, own=context.gradient_dtype)
        return (like_parameter("momentum_buffer", parameter, dtype),)

    @property
    def _adamw(self) -> FusedAdamW:
        return FusedAdamW(self.id, self.implementation, {AMSGRAD.name: False})

    def write_step(self, timeline: TimelineBuilder, parameters: Sequence[Parameter], context: OptimizerContext) -> None:
        """For each hidden matrix the gradient to orthogonalize, its bf16 copy and the Newton-Schulz products."""
        scratch = Scratch(timeline)
        for p in filter(is_hidden_matrix, parameters):
            self._write_matrix(scratch, p, context)
        scratch.close()

    def _write_matrix(self, scratch: Scratch, p: Parameter, context: OptimizerContext) -> None:
        if self.options["nesterov"]:
            scratch.assign("update", p, ("Nesterov gradient", p.numel * itemsize(context.gradient_dtype)))
        else:
            scratch.drop("update")
        if context.gradient_dtype != "bfloat16":
            scratch.assign("ortho_grad", p, ("bf16 copy of the gradient", p.numel * _BF16_BYTES))
        norm = write_whole_reduction(scratch, p, ("norm", _BF16_BYTES))
        scratch.passing(p, ("clamped norm", _BF16_BYTES))
        scratch.free(norm)
        result = self._write_newton_schulz(scratch, p)
        scratch.bind("update", result)

    def _write_newton_schulz(self, scratch: Scratch, p: Parameter) -> int:
        gram, product = min(p.shape) ** 2 * _BF16_BYTES, p.numel * _BF16_BYTES
        for _ in range(NUM_ITERATIONS):
            scratch.assign("gram_matrix", p, ("Gram matrix", gram))
            scratch.assign("gram_update", p, ("polynomial of the Gram matrix", gram))
            result = scratch.alloc(p, ("orthogonalized gradient", product))
            scratch.bind("ortho_grad", result)
        scratch.release("ortho_grad")
        scratch.drop("gram_matrix", "gram_update")
        return result

    def moved_bytes(self, parameter: Parameter, context: OptimizerContext) -> int:
        """The default, and for a hidden matrix its bf16 copy: written, a round reads it twice and writes it, read."""
        moved = super().moved_bytes(parameter, context)
        if is_hidden_matrix(parameter):
            moved += (1 + 3 * NUM_ITERATIONS + 1) * parameter.numel * _BF16_BYTES
        return moved
