"""Operations element by element and row by row: what each allocates forward and backward, and what it keeps between.

Every function records one operation of torch, or a chain that always occurs together, and returns its result. Saved
tensors are listed as backward lets them go: inputs by their torch names in alphabetical order, then results. Gradients
of several inputs are computed in that order too.

Source: pytorch `tools/autograd/derivatives.yaml` and `torch/csrc/autograd/FunctionsManual.cpp`.
"""

from __future__ import annotations

from optplan.planner.dtypes import Dtype
from optplan.planner.step.graph import Tensor
from optplan.planner.step.tape import Tape

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast", "relu")
"""The activations, as configurations name them, whose memory is known."""


def promote(a: Dtype, b: Dtype) -> Dtype:
    """The dtype in which two floating tensors meet."""
    return a if a == b else "float32"


def cast(t: Tape, x: Tensor, dtype: Dtype) -> Tensor:
    """`x.to(dtype)`: `x` itself if it has that dtype already."""
    if x.dtype == dtype:
        return x
    source, numel = x.dtype, x.numel
    category = x.node.category if x.node is not None else None

    def backward(gradients: list[Tensor]) -> list[Tensor]:
        return [t.new(numel, source, "gradient", category, permuted=gradients[0].permuted)]

    node = t.node([x], backward) if x.node is not None else None
    out = t.new(numel, dtype, f"output in {dtype}", permuted=x.permuted)
    out.node = node
    return out


def add(t: Tape, a: Tensor, b: Tensor, operation: str = "sum") -> Tensor:
    """`a + b`, either possibly broadcast."""
    node = t.node([a, b], lambda gradients: [gradients[0], gradients[0]])
    out = t.new(max(a.numel, b.numel), promote(a.dtype, b.dtype), operation, permuted=a.permuted)
    out.node = node
    return out


def add_constant(t: Tape, x: Tensor, dtype: Dtype | None = None, operation: str = "output") -> Tensor:
    """`x + c` for a number, or for a tensor without gradient and no larger than `x`."""
    node = t.node([x], lambda gradients: [gradients[0]])
    out = t.new(x.numel, dtype or x.dtype, operation, permuted=x.permuted)
    out.node = node
    return out


def scale(t: Tape, x: Tensor, operation: str = "scaled") -> Tensor:
    """`x * c` or `x / c` for a number."""

    def backward(gradients: list[Tensor]) -> list[Tensor]:
        return [t.new(gradients[0].numel, gradients[0].dtype, "gradient", permuted=gradients[0].permuted)]

    node = t.node([x], backward)
    out = t.new(x.numel, x.dtype, operation, permuted=x.permuted)
    out.node = node
    return out


def multiply(t: Tape, a: Tensor, b: Tensor, operation: str = "product", *, columns: bool = False) -> Tensor:
    """`a * b`, both with gradients; one may be broadcast, over the leading dimensions if `columns`."""
    numel, dtype = max(a.numel, b.numel), promote(a.dtype, b.dtype)

    def backward(gradients: list[Tensor]) -> list[Tensor]:
        permuted = gradients[0].permuted
        of_b = t.new(numel, dtype, "gradient", permuted=permuted)
        return [t.new(numel, dtype, "gradient", permuted=permuted), of_b]

    node = t.node([a, b], backward, [b, a])
    if columns:
        node.broadcast = 0 if a.numel < numel or a.storage is None else 1
    out = t.new(numel, dtype, operation, permuted=a.permuted)
    out.node = node
    return out


def multiply_constant(t: Tape, x: Tensor, constant: Tensor, operation: str = "product") -> Tensor:
    """`x * constant` for a tensor without gradient, broadcast to `x`."""
    numel, dtype = x.numel, promote(x.dtype, constant.dtype)

    def backward(gradients: list[Tensor]) -> list[Tensor]:
        return [t.new(numel, dtype, "gradient", permuted=gradients[0].permuted)]

    node = t.node([x], backward, [constant])
    out = t.new(numel, dtype, operation, permuted=x.permuted)
    out.node = node
    return out


def power(t: Tape, x: Tensor) -> Tensor:
    """`x ** n` for a number n above 1."""
    numel, dtype = x.numel, x.dtype

    def backward(_: list[Tensor]) -> list[Tensor]:
        lower = t.new(numel, dtype, "lower power")
        scaled = t.new(numel, dtype, "gradient times exponent")
        result = t.new(numel, dtype, "gradient")
        del scaled, lower
        return [result]

    node = t.node([x], backward, [x])
    out = t.new(numel, dtype, "power")
    out.node = node
    return out


def mean_of_rows(t: Tape, x: Tensor, num_rows: int) -> Tensor:
    """`x.mean(-1, keepdim=True)`."""
    numel, dtype = x.numel, x.dtype
    node = t.node([x], lambda _: [t.new(numel, dtype, "gradient")])
    out = t.new(num_rows, dtype, "mean")
    out.node = node
    return out


def reciprocal_root(t: Tape, x: Tensor) -> Tensor:
    """`torch.rsqrt(x)`."""
    numel, dtype = x.numel, x.dtype

    def backward(_: list[Tensor]) -> list[Tensor]:
        cubed = t.new(numel, dtype, "cube")
        scaled = t.new(numel, dtype, "scaled gradient")
        result = t.new(numel, dtype, "gradient")
        del scaled, cubed
        return [result]

    node = t.node([x], backward)
    out = t.new(numel, dtype, "reciprocal root")
    out.node = node
    t.save(node, [out])
    return out


def pointwise(t: Tape, x: Tensor, operation: str, *, saves_output: bool = False) -> Tensor:
    """An activation with a backward kernel of its own, such as SiLU, the fused GELU or tanh."""
    numel, dtype = x.numel, x.dtype
    node = t.node([x], lambda _: [t.new(numel, dtype, "gradient")], () if saves_output else [x])
    out = t.new(numel, dtype, operation)
    out.node = node
    if saves_output:
        t.save(node, [out])
    return out


def activation(t: Tape, x: Tensor, name: str) -> Tensor:
    """The activation that configurations call `name`, one of `ACTIVATIONS`."""
    if name == "gelu_new":
        return gelu_new(t, x)
    if name == "gelu_fast":
        return gelu_fast(t, x)
    return pointwise(t, x, "output", saves_output=name == "relu")


def gelu_new(t: Tape, x: Tensor) -> Tensor:
    """GPT-2's GELU written out: `0.5 x (1 + tanh(c (x + a x^3)))`; the power is taken in fp32 under autocast."""
    half = scale(t, x, "half the input")
    # The cast, where there is one, is saved by the power and otherwise gone at once.
    inner = add(t, x, scale(t, power(t, cast(t, x, "float32") if t.autocast else x), "scaled cube"), "inner sum")
    inner = scale(t, inner, "argument of tanh")
    inner = pointwise(t, inner, "tanh", saves_output=True)
    inner = add_constant(t, inner)
    return multiply(t, half, inner, "output")


def gelu_fast(t: Tape, x: Tensor) -> Tensor:
    """GPT-NeoX-20B's GELU written out: `0.5 x (1 + tanh(c x (1 + (a x) x)))`."""
    half = scale(t, x, "half the input")
    inner = multiply(
        t,
        scale(t, x, "scaled input"),
        add_constant(t, multiply(t, scale(t, x, "input times a"), x, "scaled square")),
        "argument of tanh",
    )
    inner = pointwise(t, inner, "tanh", saves_output=True)
    inner = add_constant(t, inner)
    return multiply(t, half, inner, "output")


def softmax(t: Tape, x: Tensor, operation: str = "softmax") -> Tensor:
    """`softmax(x)` in the dtype of `x`."""
    return _softmax(t, x, x.dtype, operation)


def wide_softmax(t: Tape, x: Tensor, operation: str = "softmax") -> Tensor:
    """`softmax(x, dtype=torch.float32)`: what is in float16 the kernel itself widens, and the gradient it narrows.

    Source: pytorch `aten/src/ATen/native/SoftMax.cpp` (`half_to_float`).
    """
    return _softmax(t, x if x.dtype == "float16" else cast(t, x, "float32"), "float32", operation)


def _softmax(t: Tape, x: Tensor, dtype: Dtype, operation: str) -> Tensor:
    numel, source = x.numel, x.dtype

    def backward(_: list[Tensor]) -> list[Tensor]:
        result = t.new(numel, source, "gradient of the softmax")
        t.new(numel, dtype, "gradient times softmax")
        return [result]

    node = t.node([x], backward)
    out = t.new(numel, dtype, operation)
    out.node = node
    t.save(node, [out])
    return out


def dropout(t: Tape, x: Tensor, probability: float) -> Tensor:
    """`F.dropout` in training: `x` itself if nothing is dropped."""
    if probability == 0.0:
        return x
    numel, dtype = x.numel, x.dtype
    node = t.node([x], lambda _: [t.new(numel, dtype, "gradient")])
    mask = t.new(numel, "bool", "dropout mask")
    out = t.new(numel, dtype, "output after dropout")
    out.node = node
    t.save(node, [mask])
    return out


def layer_norm(t: Tape, x: Tensor, width: int, *, bias: bool = True) -> Tensor:
    """`F.layer_norm` with the weight of the current module and its bias if it has one; fp32 under autocast."""
    dtype: Dtype = x.dtype if t.autocast is None else "float32"
    x = cast(t, x, dtype)
    names = ("weight", "bias") if bias else ("weight",)
    parameters = [t.parameter(f"{t.path}.{name}", width) for name in names]
    numel, num_rows = x.numel, x.numel // width

    def backward(_: list[Tensor]) -> list[Tensor]:
        result = t.new(numel, dtype, "gradient")
        return [result, *(t.new(width, dtype, f"{name} gradient", "gradients") for name in names)]

    node = t.node([x, *parameters], backward, [x])
    out = t.new(numel, dtype, "output")
    mean, deviation = t.new(num_rows, "float32", "mean"), t.new(num_rows, "float32", "reciprocal deviation")
    out.node = node
    t.save(node, [mean, deviation])
    return out
