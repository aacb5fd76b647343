"""What GaLore and APOLLO share: which tensors they project, and the dense AdamW for all others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from optplan.planner.optimizers.base import OptimizerContext, itemsize
from optplan.planner.optimizers.options import Option
from optplan.planner.optimizers.parts import like_parameter
from optplan.planner.optimizers.scratch import Scratch
from optplan.planner.tensors import Parameter, StateTensor

TARGET = Option(
    "target", "text", "linear",
    "what is projected: linear layers of attention and MLP, as trainers match them, or every matrix",
    choices=("linear", "all-matrices"),
)  # fmt: skip

_TARGET_ROLES = frozenset({"query", "key", "value", "fused_qkv", "attention_output", "mlp"})


def is_projected(parameter: Parameter, target: str) -> bool:
    """Whether a tensor's gradient is projected.

    Trainers hand over the weights of `nn.Linear` modules inside attention and MLP blocks; embeddings, norms, biases,
    the output head, GPT-2's `Conv1D` and stacked experts stay dense.
    """
    if len(parameter.shape) != 2:
        return False
    return target == "all-matrices" or (parameter.module == "linear" and parameter.role in _TARGET_ROLES)


def none_projected(id_: str, target: str, parameters: Sequence[Parameter]) -> str | None:
    """Why a trainer refuses this model: nothing in it matches the target."""
    if any(is_projected(p, target) for p in parameters):
        return None
    if target == "linear":
        return f"{id_} with target=linear finds no nn.Linear in attention or MLP blocks; use target=all-matrices"
    return f"{id_} with target=all-matrices finds no matrix"


def low_rank_shape(parameter: Parameter, rank: int) -> tuple[int, int]:
    """Shape of the projected gradient: the shorter side becomes `rank` (of equal sides the columns)."""
    rows, columns = parameter.shape
    return (rows, rank) if rows >= columns else (rank, columns)


def unmoved_bytes(projector: StateTensor) -> int:
    """What the default floor counts too much for a projector: it is read, not written, and only its own elements."""
    return 2 * projector.num_bytes - math.prod(projector.shape) * itemsize(projector.dtype)


def dense_state(parameter: Parameter, context: OptimizerContext) -> tuple[StateTensor, ...]:
    """State of a tensor that is not projected: AdamW's two moments, the step is a Python integer."""
    return tuple(like_parameter(name, parameter, context.gradient_dtype) for name in ("exp_avg", "exp_avg_sq"))


def write_loop(
    scratch: Scratch, parameters: Sequence[Parameter], context: OptimizerContext, write_projected: Callable[..., None],
    *, target: str,
) -> None:  # fmt: skip
    """Append a step over all tensors: the dense ones, then the projected ones by `write_projected(scratch, parameter)`.

    The two kinds are separate param groups, in the order in which trainers make them.
    """
    width = itemsize(context.gradient_dtype)
    for p in parameters:
        if not is_projected(p, target):
            write_direction(scratch, p, p.numel * width)
    for p in parameters:
        if is_projected(p, target):
            write_projected(scratch, p)
    scratch.close()


def write_direction(scratch: Scratch, parameter: Parameter, num_bytes: int) -> None:
    """Append Adam's denominator and direction; both outlive the tensor's turn."""
    scratch.assign("denom", parameter, ("denominator", num_bytes))
    scratch.assign("norm_grad", parameter, ("direction", num_bytes))
