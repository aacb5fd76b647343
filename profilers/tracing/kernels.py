"""What CUDA kernels do to memory that the same operations on tensors without contents do not.

Every entry of `KERNELS` runs one operation and records what its CUDA kernel allocates, in that order. The sizes come
from `optplan.planner.step.kernels` and `optplan.planner.reductions`, which name their sources.

Source: pytorch `aten/src/ATen/native/cuda/{ScanKernels,EmbeddingBackwardKernel,Sort,Reduce}.cu*`,
`native/transformers/cuda/attention.cu` and `attention_backward.cu`; allocation histories of an H200.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from optplan.planner.reductions import column_reduction_bytes, row_reduction_bytes, whole_reduction_bytes
from optplan.planner.step import kernels
from optplan.planner.timeline import Category
from optplan.profilers.tracing.recorder import Recorder

aten = torch.ops.aten


class Call(NamedTuple):
    """One operation about to run.

    Attributes:
        recorder: Where to record.
        func: The operation.
        args: Its arguments by position.
        kwargs: Its other arguments.
        category: What its results are for.
        name: What it is called in the timeline.
        resident_threads: Threads that the simulated GPU holds at once.
        capability: Its compute capability.
    """

    recorder: Recorder
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    category: Category
    name: str
    resident_threads: int
    capability: tuple[int, int]

    def run(self) -> Any:
        """The operation's results on tensors without contents."""
        return self.func(*self.args, **self.kwargs)

    def track(self, *results: Any) -> None:
        """Record the memory of results."""
        for result in results:
            if isinstance(result, torch.Tensor):
                self.recorder.track(result, self.category, self.name)

    def hold(self, *sizes: int) -> list[int]:
        """Record scratch that lives until it is released."""
        category: Category = "workspace" if self.category != "optimizer_temporaries" else "optimizer_temporaries"
        return [self.recorder.alloc(num_bytes, category, self.name) for num_bytes in sizes]

    def release(self, ids: list[int]) -> None:
        """Record the end of scratch, last first."""
        for id_ in reversed(ids):
            self.recorder.free(id_)

    def scratch(self, *sizes: int) -> None:
        """Record scratch that is gone when the kernel returns."""
        self.recorder.scratch(sizes, self.name)


_CHUNK_NUMEL = 65_536
"""Elements that one thread block of a foreach kernel takes."""

Kernel = Callable[[Call], Any]


def reduction(call: Call) -> Any:
    """Sums, means, extrema and norms over dimensions: blocks that share an output meet in a buffer."""
    source = call.args[0]
    result = call.run()
    call.track(result)
    dims = call.args[1] if len(call.args) > 1 and isinstance(call.args[1], list | tuple | int) else None
    # Sums of booleans and of narrower integers: the whole input is cast first, where floats are cast as they are read.
    is_cast = source.dtype != result.dtype and not source.is_floating_point()
    cast = call.hold(source.numel() * result.itemsize) if is_cast else []
    call.scratch(*_reduction_bytes(source, dims, call))
    call.release(cast)
    return result


def _reduction_bytes(source: torch.Tensor, dims: Any, call: Call) -> tuple[int, int]:
    options = {"element_bytes": 4, "resident_threads": call.resident_threads}
    reduced = _reduced_dims(source, dims)
    if not source.numel() or not reduced:
        return (0, 0)
    sizes, last = source.shape, source.dim() - 1
    count = math.prod(sizes[dim] for dim in reduced)
    kept = source.numel() // count
    if kept == 1:
        return whole_reduction_bytes(count, **options)
    if max(reduced) == last:
        return row_reduction_bytes(kept, count, **options)
    inner = math.prod(sizes[max(reduced) + 1 :])
    return column_reduction_bytes(count, inner, matrices=kept // inner, **options)


def _reduced_dims(source: torch.Tensor, dims: Any) -> list[int]:
    """The dimensions reduced that have more than one element."""
    num_dims = source.dim()
    chosen = range(num_dims) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    return [dim % num_dims for dim in chosen if num_dims and source.shape[dim] > 1]


def cumulative_sum(call: Call) -> Any:
    """`cumsum`: integers narrower than the result are cast first; a single row is scanned by cub."""
    result = call.run()
    call.track(result)
    source = call.args[0]
    cast = call.hold(result.numel() * result.itemsize) if source.dtype != result.dtype else []
    if source.dim() and source.shape[call.args[1]] == source.numel():
        call.scratch(kernels.NARROW_SCAN_SCRATCH if result.dtype == torch.int32 else kernels.SCAN_SCRATCH)
    call.release(cast)
    return result


def sort(call: Call) -> Any:
    """`sort` of one row: the positions that are sorted along, and the scratch of a large sort."""
    result = call.run()
    call.track(*result)
    count = result[0].numel()
    if result[0].dim() == 1:
        numbers = call.hold(8 * count)
        if count > kernels.SMALL_SORT:
            call.scratch(kernels.radix_sort_scratch(count))
        call.release(numbers)
    return result


def accumulating_index_put(call: Call) -> None:
    """`index_put` that adds up: the indices are brought into range, made linear and sorted."""
    source, indices, _, *accumulates = call.args
    if not any(accumulates):
        return
    chosen = [index for index in indices if index is not None]
    count = torch.broadcast_tensors(*chosen)[0].numel()  # type: ignore[no-untyped-call]
    num_rows = math.prod(size for size, index in zip(source.shape, indices, strict=False) if index is not None)
    in_range, linear = call.hold(8 * count), call.hold(8 * count)
    call.release(in_range)
    held = call.hold(*(8 * count,) * 3)
    call.scratch(kernels.pair_sort_scratch(count, num_rows))
    call.release(linear)
    call.release(held)


def embedding(call: Call) -> Any:
    """`embedding`: the indices of one sequence that serve all are written out to be used."""
    indices = call.args[1]
    written_out = call.hold(*_size_in_a_row(indices))
    result = call.run()
    call.track(result)
    call.release(written_out)
    return result


def _size_in_a_row(tensor: torch.Tensor) -> list[int]:
    """Bytes of a tensor that has to be copied to lie in memory row by row; nothing if it does already."""
    return [] if tensor.is_contiguous() else [tensor.numel() * tensor.itemsize]


def embedding_gradient(call: Call) -> Any:
    """`embedding_dense_backward`: many tokens are sorted first and summed row by row."""
    in_a_row = call.hold(*_size_in_a_row(call.args[0]), *_size_in_a_row(call.args[1]))
    result = _embedding_gradient(call)
    call.release(in_a_row)
    return result


def _embedding_gradient(call: Call) -> Any:
    gradient, indices, num_rows = call.args[:3]
    num_tokens = indices.numel()
    segments = kernels.embedding_partial_sums(num_tokens, num_rows)
    if segments is None:
        result = call.run()
        call.track(result)
        return result
    index_bytes, row_bytes = 8 * num_tokens, 8 * min(num_tokens, num_rows)
    order = call.hold(index_bytes, index_bytes)
    call.scratch(index_bytes, kernels.radix_sort_scratch(num_tokens))
    result = call.run()
    call.track(result)
    counts = call.hold(index_bytes, 8)
    call.scratch(index_bytes, kernels.SCAN_SCRATCH)
    rows = call.hold(row_bytes, row_bytes)
    call.scratch(kernels.SCAN_SCRATCH)
    is_fp32 = gradient.dtype == torch.float32
    sums = kernels.embedding_segment_scratch(segments, num_rows, gradient.shape[-1], is_fp32=is_fp32)
    call.scratch(8, 8 * segments, *sums)
    for held in (rows, counts, order):
        call.release(held)
    return result


def flash_attention(call: Call) -> Any:
    """Flash attention: output, log-sums, then the state of the random generator."""
    result = call.run()
    call.track(result[0], result[1], result[6], result[7])
    return result


def cudnn_attention(call: Call) -> Any:
    """Attention by cuDNN: the state of the random generator comes first, a workspace last."""
    result = call.run()
    keeps_sums = call.args[4]
    call.track(result[6], result[7], result[0], *result[1:2] * keeps_sums)
    if not keeps_sums:
        call.recorder.ignore(result[1])
    call.scratch(256)
    return result


def efficient_attention(call: Call) -> Any:
    """Memory-efficient attention: the state of the random generator stays on the host."""
    result = call.run()
    call.track(result[0], result[1])
    for seed in result[2:4]:
        call.recorder.ignore(seed)
    return result


def flash_attention_backward(call: Call) -> Any:
    """Gradients of flash attention, and its scratch."""
    query, key = call.args[1:3]
    result = call.run()
    call.track(*result)
    call.scratch(*kernels.flash_backward_scratch(*_attention_sizes(query, key)))
    return result


def cudnn_attention_backward(call: Call) -> Any:
    """Gradients of cuDNN's attention, and its workspace."""
    query, key = call.args[1:3]
    result = call.run()
    call.track(*result)
    call.scratch(kernels.cudnn_backward_scratch(*_attention_sizes(query, key)))
    return result


def efficient_attention_backward(call: Call) -> Any:
    """Gradients of memory-efficient attention, the products it sums first, and its workspace."""
    query, key = call.args[1:3]
    batch, heads, _, seq, width = _attention_sizes(query, key)
    num_rows = batch * heads * seq
    result = call.run()
    call.track(*result)
    if query.itemsize == 4:
        product, sums, delta = call.hold(4 * query.numel(), 4 * num_rows, 4 * num_rows)
        call.release([product, sums])
    else:
        (delta,) = call.hold(4 * num_rows)
    workspace = kernels.efficient_backward_scratch(batch, heads, seq, width, itemsize=query.itemsize)
    call.release([delta, *call.hold(workspace)][::-1])
    return result


def _attention_sizes(query: torch.Tensor, key: torch.Tensor) -> tuple[int, int, int, int, int]:
    """Sequences, query heads, key heads, tokens and head width of `[batch, heads, tokens, width]`."""
    batch, heads, seq, width = query.shape
    return batch, heads, key.shape[1], seq, width


def softmax_gradient(call: Call) -> Any:
    """`_softmax_backward_data`: gradient times softmax is written out first, a tensor like any other of the step."""
    gradient, output = call.args[:2]
    result = call.run()
    call.track(result)
    product = gradient.numel() * max(gradient.itemsize, output.itemsize)
    call.recorder.free(call.recorder.alloc(product, call.category, call.name))
    return result


def safe_softmax(call: Call) -> Any:
    """`_safe_softmax`: a search for rows without a finite score follows the softmax."""
    result = call.run()
    call.track(result)
    numel = result.numel()
    call.scratch(numel, numel // max(result.shape[call.args[1]], 1), result.itemsize)
    return result


def dropout(call: Call) -> Any:
    """`native_dropout`: the mask comes before the result."""
    result = call.run()
    call.track(result[1], result[0])
    return result


def foreach_norm(call: Call) -> Any:
    """`_foreach_norm`: every chunk of a tensor has a norm of its own first."""
    tensors = call.args[0]
    chunks = -(-max(x.numel() for x in tensors) // _CHUNK_NUMEL)
    parts = call.hold(4 * len(tensors) * chunks)
    results = call.run()
    call.track(*results)
    call.release(parts)
    return results


def grouped_product(call: Call) -> Any:
    """`_grouped_mm`: CUDA takes any floating dtype, group by group unless it is bf16."""
    dtype = call.args[0].dtype
    halves = [x.to(torch.bfloat16) for x in call.args[:2]]
    shape = call.func(*halves, *call.args[2:], **call.kwargs)
    result = shape if dtype == torch.bfloat16 else torch.empty_like(shape, dtype=dtype)
    call.track(result)
    offsets = call.kwargs.get("offs", call.args[2] if len(call.args) > 2 else None)
    if dtype == torch.bfloat16 and offsets is not None:
        call.scratch(*kernels.grouped_product_scratch(offsets.numel(), call.resident_threads))
    return result


def convolution_gradient(call: Call) -> Any:
    """`convolution_backward`: a gradient that does not lie in memory row by row is copied first."""
    in_a_row = call.hold(*_size_in_a_row(call.args[0]))
    result = call.run()
    call.track(*result[:2])
    _, images, weight, _, stride = call.args[:5]
    if not call.args[10][0] and list(stride) == list(weight.shape[2:]) and call.capability >= (8, 0):
        num_images, channels = images.shape[:2]
        sizes = {"num_images": num_images, "sizes": (channels, weight.shape[0]), "itemsize": images.itemsize}
        call.scratch(kernels.patch_gradient_scratch(images.numel(), call.args[0].numel(), weight.numel(), **sizes))
    call.release(in_a_row)
    call.track(result[2])
    return result


def equal(call: Call) -> bool:
    """`equal`: all elements are compared, the comparisons are joined and the answer, taken to be yes, is read."""
    call.track(*call.args[:2])  # `torch.tensor` is not seen when it makes one of them
    call.scratch(call.args[0].numel(), 1)
    return True


def in_place(call: Call) -> Any:
    """An operation that changes its arguments and that has no implementation without contents."""
    del call


KERNELS: dict[Any, Kernel] = {
    aten.sum.dim_IntList: reduction,
    aten.sum.default: reduction,
    aten.mean.dim: reduction,
    aten.mean.default: reduction,
    aten.amax.default: reduction,
    aten.amin.default: reduction,
    aten.linalg_vector_norm.default: reduction,
    aten.cumsum.default: cumulative_sum,
    aten.sort.default: sort,
    aten.sort.stable: sort,
    aten.embedding.default: embedding,
    aten.convolution_backward.default: convolution_gradient,
    aten._softmax_backward_data.default: softmax_gradient,
    aten._safe_softmax.default: safe_softmax,
    aten.native_dropout.default: dropout,
    aten.embedding_dense_backward.default: embedding_gradient,
    aten._scaled_dot_product_flash_attention.default: flash_attention,
    aten._scaled_dot_product_cudnn_attention.default: cudnn_attention,
    aten._scaled_dot_product_efficient_attention.default: efficient_attention,
    aten._scaled_dot_product_flash_attention_backward.default: flash_attention_backward,
    aten._scaled_dot_product_cudnn_attention_backward.default: cudnn_attention_backward,
    aten._scaled_dot_product_efficient_attention_backward.default: efficient_attention_backward,
    aten._foreach_norm.Scalar: foreach_norm,
    aten._grouped_mm.default: grouped_product,
    aten.equal.default: equal,
    aten._fused_sgd_.default: in_place,
    aten._amp_update_scale_.default: in_place,
}

AFTERWARDS: dict[Any, Callable[[Call], None]] = {aten.index_put.default: accumulating_index_put}
"""What operations that may write into memory that is there already allocate besides."""
