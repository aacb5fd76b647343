"""What a step finds in place, but for the optimizer's: parameters, buffers, token ids, libraries' workspaces."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from optplan.planner.allocator.caching import ROUNDING
from optplan.planner.dtypes import ITEMSIZE_BYTES
from optplan.planner.models.spec import ModelSpec
from optplan.planner.sharding.base import Strategy
from optplan.planner.step.options import HOPPER, StepOptions
from optplan.planner.step.placement import placed_tensors
from optplan.planner.step.view import model_view
from optplan.planner.step.vocabulary import INDEX_BYTES
from optplan.planner.timeline import Category, TimelineBuilder
from optplan.planner.units import KIB, MIB, round_up

_HOPPER_WORKSPACE, _WORKSPACE = 32 * MIB, 2 * 4096 * KIB + 8 * 16 * KIB
_LT_WORKSPACE = MIB


def write_load(
    timeline: TimelineBuilder, spec: ModelSpec, options: StepOptions, strategy: Strategy | None = None
) -> None:
    """Append, in phase load, everything resident but for the optimizer's and what the strategy replaces later.

    Parameters and buffers come in the order in which moving the model to the GPU places them.
    """
    timeline.phase = "load"
    for name, num_bytes in model_tensors(spec, options, strategy):
        timeline.alloc(num_bytes, "parameters", name)
    for name, num_bytes, category in surroundings(spec, options):
        timeline.alloc(num_bytes, category, name)


def model_tensors(spec: ModelSpec, options: StepOptions, strategy: Strategy | None = None) -> Iterator[tuple[str, int]]:
    """Name and bytes of each parameter (tied aliases left out) and each buffer; what is sharded comes before these."""
    dtype = options.parameter_dtype
    if strategy is None:
        yield from placed_tensors(spec, dtype)
        return
    yield from strategy.parameters(model_view(spec, options))
    for buffer in spec.buffers:
        yield buffer.name, buffer.numel * ITEMSIZE_BYTES[buffer.dtype or dtype]


def surroundings(spec: ModelSpec, options: StepOptions) -> Iterator[tuple[str, int, Category]]:
    """Name, bytes and category of the inputs and of the workspaces that the first step leaves.

    The thread of the forward and that of the backward each make a cuBLAS handle. A product with a bias added in the
    same kernel takes a cuBLASLt workspace too, in the threads that run such: the backward's when it recomputes layers.

    Source: pytorch `aten/src/ATen/cuda/CublasHandlePool.cpp` (`parseChosenWorkspaceSize`), `CUDABlas.cpp`; sizes as
    recorded on an H200.
    """
    yield from inputs(spec, options)
    has_biases = any(added_biases(spec))
    size = _HOPPER_WORKSPACE if options.compute_capability == HOPPER else _WORKSPACE
    for thread in ("forward", "backward"):
        yield f"cuBLAS workspace of the {thread}", size, "workspace"
        if has_biases and (thread == "forward" or options.recomputes):
            yield f"cuBLASLt workspace of the {thread}", _LT_WORKSPACE, "workspace"


def inputs(spec: ModelSpec, options: StepOptions) -> Iterator[tuple[str, int, Category]]:
    """Name, bytes and category of what the model is called with; token ids are their own labels."""
    if spec.model_type == "vit":
        images = options.batch_size * spec.config["num_channels"] * prod(spec.config["image_size"])
        yield "images", images * ITEMSIZE_BYTES[options.parameter_dtype], "activations"
        yield "labels", INDEX_BYTES * options.batch_size, "activations"
        return
    num_bytes = INDEX_BYTES * options.batch_size * options.seq_len
    yield "token ids", num_bytes, "activations"
    if options.padding_mask:
        yield "padding mask", num_bytes, "activations"


def added_biases(spec: ModelSpec) -> Iterator[str]:
    """Names of the biases that a product adds in its own kernel."""
    return (p.name for p in spec.parameters if p.role == "bias" and p.module in ("linear", "conv1d"))


def gradient_tensors(
    spec: ModelSpec, options: StepOptions, strategy: Strategy | None = None
) -> Iterator[tuple[str, int]]:
    """Name and bytes of each gradient: one a parameter, unless the strategy has it otherwise."""
    if strategy is not None:
        return strategy.gradients(model_view(spec, options))
    itemsize = ITEMSIZE_BYTES[options.parameter_dtype]
    return ((parameter.name, parameter.numel * itemsize) for parameter in spec.trained_parameters)


def surrounding_use(spec: ModelSpec, options: StepOptions, strategy: Strategy | None = None) -> dict[Category, int]:
    """Rounded bytes by category of the surroundings and of gradients that exist before the forward."""
    use: dict[Category, int] = {}
    for _, num_bytes, category in surroundings(spec, options):
        use[category] = use.get(category, 0) + round_up(num_bytes, ROUNDING)
    if options.has_gradients:
        use["gradients"] = sum(
            round_up(num_bytes, ROUNDING) for _, num_bytes in gradient_tensors(spec, options, strategy)
        )
    return use
