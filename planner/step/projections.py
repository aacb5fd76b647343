"""Operations on matrices and heads: projections, batched products, slices and copies.

Every function records one operation of torch, or a chain that always occurs together, and returns its result. Saved
tensors are listed as backward lets them go: inputs by their torch names in alphabetical order, then results. Gradients
of several inputs are computed in that order too.

Source: pytorch `tools/autograd/derivatives.yaml` and `torch/csrc/autograd/FunctionsManual.cpp`;
the autocast lists in `aten/src/ATen/autocast_mode.h`.
"""

from __future__ import annotations

from collections.abc import Sequence

from optplan.planner.dtypes import ITEMSIZE_BYTES, Dtype
from optplan.planner.step import kernels
from optplan.planner.step.graph import LAST, Tensor
from optplan.planner.step.operations import cast, promote
from optplan.planner.step.options import StepOptions
from optplan.planner.step.tape import Tape


def autocast_parameter(t: Tape, name: str, numel: int) -> Tensor:
    """The parameter `name` in autocast's dtype: cast once and kept until autocast is left."""
    parameter = t.parameter(name, numel)
    if t.autocast is None:
        return parameter
    key = (t.layer, name)
    if key not in t.casts:
        dtype = parameter.dtype
        node = t.node([parameter], lambda _: [t.new(numel, dtype, "weight gradient", "gradients")])
        copy = t.new(numel, t.autocast, f"weight in {t.autocast}")
        copy.node = node
        t.casts[key] = copy
    return t.casts[key]


def autocast_input(t: Tape, x: Tensor) -> Tensor:
    """The input of a product in autocast's dtype: a leaf, such as what a reentrant checkpoint runs on, is cast once."""
    dtype = t.autocast or x.dtype
    if x.dtype == dtype or x.node is None or x.node.sequence != LAST:
        return cast(t, x, dtype)
    key = (t.layer, f"argument {id(x)}")
    if key not in t.casts:
        t.casts[key] = cast(t, x, dtype)
    return t.casts[key]


def copy_gradient(t: Tape, gradients: list[Tensor], operation: str) -> None:
    """Replace a node's incoming gradient by a copy that lies differently."""
    gradient = gradients[0]
    copy = t.new(gradient.numel, gradient.dtype, operation)
    assert copy.storage is not None and gradient.storage is not None
    gradient.storage.holders -= 1
    copy.storage.holders = 1
    gradients[0] = copy


def linear(t: Tape, x: Tensor, num_in: int, num_out: int, *, bias: bool = False) -> Tensor:
    """The current module's `nn.Linear`; under autocast its bias is cast first and its input last."""
    added = autocast_parameter(t, f"{t.path}.bias", num_out) if bias else None
    weight = autocast_parameter(t, f"{t.path}.weight", num_in * num_out)
    return project(t, autocast_input(t, x), weight, added, num_in, num_out)


def conv1d(t: Tape, x: Tensor, num_in: int, num_out: int) -> Tensor:
    """The current module's `Conv1D` of GPT-2; under autocast its weight is cast first and its bias last."""
    weight = autocast_parameter(t, f"{t.path}.weight", num_in * num_out)
    x = autocast_input(t, x)
    return project(t, x, weight, autocast_parameter(t, f"{t.path}.bias", num_out), num_in, num_out)


def output_head(t: Tape, x: Tensor, num_in: int, num_out: int, *, name: str, bias: str | None = None) -> Tensor:
    """The projection onto the vocabulary by the weight `name`, which is the embedding's where they are tied."""
    added = autocast_parameter(t, bias, num_out) if bias is not None else None
    weight = autocast_parameter(t, name, num_in * num_out)
    x = cast(t, x, t.autocast or x.dtype)
    t.category = "logits_and_loss"
    return project(t, x, weight, added, num_in, num_out)


def project(t: Tape, x: Tensor, weight: Tensor, bias: Tensor | None, num_in: int, num_out: int) -> Tensor:
    """`x @ weight + bias`, all of one dtype."""
    dtype, num_rows, has_bias = x.dtype, x.numel // num_in, bias is not None

    def of_input() -> Tensor:
        return t.new(num_rows * num_in, dtype, "gradient of the input").view()

    def of_weight() -> Tensor:
        return t.new(num_in * num_out, dtype, "weight gradient", "gradients").view()

    def backward(gradients: list[Tensor]) -> list[Tensor]:
        if gradients[0].permuted:
            copy_gradient(t, gradients, "gradient with its heads joined")
        if has_bias:
            return [of_input(), of_weight(), gradients[0]]
        weight_gradient = of_weight()
        return [of_input(), weight_gradient]

    inputs = [x, weight] if bias is None else [x, weight, bias]
    node = t.node(inputs, backward, [x, weight] if has_bias else [weight, x])
    node.broadcast = 2 if has_bias else None
    out = t.new(num_rows * num_out, dtype, "output")
    out.node = node
    return out


def batched_product(t: Tape, a: Tensor, b: Tensor, numel: int, operation: str, *, joined: bool = False) -> Tensor:
    """`torch.bmm(a, b)` of `numel` elements.

    Args:
        t: The tape.
        a: Left factors, one a head.
        b: Right factors, one a head.
        numel: Elements of the result.
        operation: What the result is.
        joined: Whether the result's gradient comes with its heads joined, so that it must be copied.
    """
    dtype, sizes = a.dtype, (a.numel, b.numel)

    def backward(gradients: list[Tensor]) -> list[Tensor]:
        if joined:
            copy_gradient(t, gradients, "gradient by head")
        of_b = t.new(sizes[1], dtype, "gradient", permuted=True)
        return [t.new(sizes[0], dtype, "gradient", permuted=True), of_b]

    node = t.node([a, b], backward, [b, a])
    out = t.new(numel, dtype, operation)
    out.node = node
    return out


def clone(t: Tape, x: Tensor, operation: str, *, copies: int = 1, permuted: bool = False) -> Tensor:
    """`x` written out anew, each head `copies` times; backward adds the copies up.

    Args:
        t: The tape.
        x: What is copied.
        operation: What the copy is.
        copies: How often each head is written.
        permuted: Whether gradients come back with the heads apart.
    """
    numel, dtype = x.numel, x.dtype

    def backward(gradients: list[Tensor]) -> list[Tensor]:
        if copies == 1:
            return [gradients[0].view(permuted=permuted)]
        return [t.new(numel, dtype, "gradient summed over the copies", permuted=permuted)]

    node = t.node([x], backward)
    out = t.new(numel * copies, dtype, operation)
    out.node = node
    return out


def expanded(t: Tape, x: Tensor, copies: int) -> Tensor:
    """`x` read `copies` times over, in the same memory; backward adds the gradients of the copies up."""
    numel, dtype = x.numel, x.dtype
    node = t.node([x], lambda _: [t.new(numel, dtype, "gradient summed over the copies")])
    return Tensor(x.storage, numel * copies, dtype, node)


def part(t: Tape, x: Tensor, numel: int, *, heads: int = 1) -> Tensor:
    """A slice of `x`, in the same memory; backward makes a gradient of the whole. All of `x` is `x` itself."""
    whole, dtype = x.numel, x.dtype
    if numel == whole:
        return x
    node = t.node([x], lambda _: [t.new(whole, dtype, "gradient among zeros", permuted=heads > 1)])
    return Tensor(x.storage, numel, dtype, node, 0, x.permuted)


def reshaped(t: Tape, x: Tensor) -> Tensor:
    """`x.view(...)`, whose gradient is never added to in place."""
    return split_heads(t, x)


def split_heads(t: Tape, x: Tensor) -> Tensor:
    """`x.view(..., heads, width).transpose(1, 2)` where it happens some time after the projection."""

    def backward(gradients: list[Tensor]) -> list[Tensor]:
        if gradients[0].permuted:
            copy_gradient(t, gradients, "gradient with its heads joined")
        return [gradients[0].view()]

    return Tensor(x.storage, x.numel, x.dtype, t.node([x], backward), 0, x.permuted)


def transposed_keys(t: Tape, x: Tensor, batch: int, seq: int) -> Tensor:
    """Keys right after their projection, for an attention that is written out.

    Such attention makes their gradient transposed. Turned back, the elements of a token lie evenly spaced, but the
    tokens of several sequences do not, so that the projection must copy it.
    """
    if batch == 1 or seq == 1:
        return x
    node = t.node([x], lambda gradients: [gradients[0].view(permuted=True)])
    return Tensor(x.storage, x.numel, x.dtype, node, 0, x.permuted)


def split(t: Tape, x: Tensor, sizes: Sequence[int], *, heads: int = 1) -> list[Tensor]:
    """`torch.split(x, ..., -1)`: the parts share the memory of `x`; backward joins their gradients, head by head."""
    numel, dtype = x.numel, x.dtype

    def backward(_: list[Tensor]) -> list[Tensor]:
        return [t.new(numel, dtype, "gradients joined", permuted=heads > 1)]

    node = t.node([x], backward, num_outputs=len(sizes))
    return [Tensor(x.storage, size, dtype, node, index, x.permuted) for index, size in enumerate(sizes)]


def concatenated(t: Tape, parts: Sequence[Tensor], operation: str, *, heads: int = 1) -> Tensor:
    """`torch.cat(parts, -1)`; backward hands each part its slice of the gradient."""
    sizes, dtype = [x.numel for x in parts], parts[0].dtype

    def backward(gradients: list[Tensor]) -> list[Tensor]:
        return [Tensor(gradients[0].storage, size, dtype, None, 0, False, True) for size in sizes]

    node = t.node(parts, backward)
    out = t.new(sum(sizes), dtype, operation, permuted=heads > 1)
    out.node = node
    return out


def patch_projection(
    t: Tape, num_pixels: int, numel: int, patch: int, width: int, *, channels: int, options: StepOptions
) -> Tensor:
    """The current module's convolution that cuts images into patches and projects each to `width` elements.

    Args:
        t: The tape.
        num_pixels: Elements of all images, which are resident.
        numel: Elements of the result.
        patch: Elements of one patch.
        width: Elements that a patch becomes.
        channels: Channels of an image.
        options: How the step is run.
    """
    added = autocast_parameter(t, f"{t.path}.bias", width)
    weight = autocast_parameter(t, f"{t.path}.weight", patch * width)
    dtype: Dtype = t.autocast or t.parameter_dtype
    scratch = kernels.patch_gradient_scratch(
        num_pixels,
        numel,
        patch * width,
        num_images=options.batch_size,
        sizes=(channels, width),
        itemsize=ITEMSIZE_BYTES[dtype],
    )
    images = Tensor(None, num_pixels, t.parameter_dtype)
    if dtype != images.dtype:
        images = t.new(num_pixels, dtype, f"input in {dtype}")

    def backward(_: list[Tensor]) -> list[Tensor]:
        contiguous = t.new(numel, dtype, "gradient of the patches")
        of_weight = t.new(patch * width, dtype, "weight gradient", "gradients")
        if scratch and options.compute_capability >= (8, 0):
            t.scratch(scratch, operation="convolution backward")
        del contiguous
        return [of_weight, t.new(width, dtype, "bias gradient", "gradients")]

    node = t.node([weight, added], backward, [images, weight])
    out = t.new(numel, dtype, "output")
    out.node = node
    return out


def joined_rows(t: Tape, row: Tensor, rows: Tensor, numel: int) -> Tensor:
    """`torch.cat` of one row, the same in every sequence, and of the others of each sequence."""
    row_size, rows_size, rows_dtype = row.numel, rows.numel, rows.dtype

    def summed(gradients: list[Tensor]) -> list[Tensor]:
        if gradients[0].numel == row_size:
            return [gradients[0].view()]
        return [t.new(row_size, gradients[0].dtype, "gradient", "gradients")]

    def backward(gradients: list[Tensor]) -> list[Tensor]:
        whole, dtype = gradients[0].storage, gradients[0].dtype
        of_row = Tensor(whole, numel - rows_size, dtype, None, 0, False, True)
        if dtype == rows_dtype:
            return [of_row, Tensor(whole, rows_size, dtype, None, 0, False, True)]
        return [of_row, t.new(rows_size, rows_dtype, "gradient")]

    first = Tensor(None, numel - rows_size, row.dtype, t.node([row], summed))
    node = t.node([first, rows], backward)
    out = t.new(numel, promote(row.dtype, rows_dtype), "joined rows")
    out.node = node
    return out
