"""The root-mean-square norms of decoders, each as its family computes it.

Source: transformers `LlamaRMSNorm`, `GemmaRMSNorm`, `Olmo2RMSNorm` and their copies in the other families.
"""

from __future__ import annotations

from typing import Literal

from optplan.planner.step.graph import Tensor
from optplan.planner.step.operations import add_constant, cast, mean_of_rows, multiply, power, reciprocal_root
from optplan.planner.step.tape import Tape

NormStyle = Literal["llama", "gemma", "olmo2", "t5"]


def rms_norm(t: Tape, hidden: Tensor, path: str, width: int, style: NormStyle) -> Tensor:
    """The norm at `path` over rows of `width` elements.

    Args:
        t: The tape.
        hidden: What is normalised.
        path: The module, within its layer.
        width: Elements of a row, as many as the weight has.
        style: `llama` weighs after casting back, `olmo2` before; `gemma` weighs by one plus the weight; `t5` normalises
            the input as it is by its root mean square in fp32.
    """
    t.path = path
    if style == "gemma":
        return _gemma(t, hidden, width)
    if style == "t5":
        return _t5(t, hidden, width)
    dtype = hidden.dtype
    hidden = cast(t, hidden, "float32")
    variance = mean_of_rows(t, power(t, hidden), hidden.numel // width)
    hidden = multiply(t, hidden, reciprocal_root(t, add_constant(t, variance)), "normalised input")
    weight = t.parameter(f"{path}.weight", width)
    if style == "olmo2":
        return cast(t, multiply(t, weight, hidden, columns=True), dtype)
    return multiply(t, weight, cast(t, hidden, dtype), "output", columns=True)


def _t5(t: Tape, hidden: Tensor, width: int) -> Tensor:
    variance = mean_of_rows(t, power(t, cast(t, hidden, "float32")), hidden.numel // width)
    hidden = multiply(t, hidden, reciprocal_root(t, add_constant(t, variance)), "normalised input")
    if t.parameter_dtype != "float32":
        hidden = cast(t, hidden, t.parameter_dtype)
    return multiply(t, t.parameter(f"{t.path}.weight", width), hidden, "output", columns=True)


def _gemma(t: Tape, x: Tensor, width: int) -> Tensor:
    output = _gemma_normalised(t, cast(t, x, "float32"), width)
    weight = t.parameter(f"{t.path}.weight", width)
    output = multiply(t, output, add_constant(t, cast(t, weight, "float32")), columns=True)
    return cast(t, output, x.dtype)


def _gemma_normalised(t: Tape, x: Tensor, width: int) -> Tensor:
    num_rows = x.numel // width
    return multiply(
        t, x, reciprocal_root(t, add_constant(t, mean_of_rows(t, power(t, x), num_rows))), "normalised input"
    )
