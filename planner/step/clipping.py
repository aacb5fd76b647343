"""What `torch.nn.utils.clip_grad_norm_` allocates on the device: norms and a factor, no gradient's copy.

Source: pytorch `torch/nn/utils/clip_grad.py`, `native/cuda/ForeachReduceOp.cu` (foreach, the default on CUDA) and
`native/cuda/Reduce.cuh` (a norm at a time); sizes as recorded on an H200.
"""

from __future__ import annotations

from collections.abc import Sequence

from optplan.planner.dtypes import ITEMSIZE_BYTES, Dtype
from optplan.planner.reductions import H200_THREADS, whole_reduction_bytes
from optplan.planner.tensors import Parameter
from optplan.planner.timeline import TimelineBuilder

_CHUNK = 65_536
"""Elements that one thread block of a foreach norm takes."""


def write_clipping(
    timeline: TimelineBuilder,
    parameters: Sequence[Parameter],
    *,
    dtype: Dtype,
    foreach: bool = True,
    resident_threads: int = H200_THREADS,
) -> None:
    """Append, in phase clip, the norm of all gradients of this dtype and their scaling in place.

    Args:
        timeline: Where to append.
        parameters: Those whose gradients are clipped.
        dtype: Of the gradients.
        foreach: Whether the norms are taken in one kernel (torch's default on CUDA) or one after another.
        resident_threads: Threads that the GPU holds at once; they decide how a norm of its own is split.
    """
    timeline.phase = "clip"
    itemsize = ITEMSIZE_BYTES[dtype]

    def scalar(name: str) -> int:
        return timeline.alloc(itemsize, "optimizer_temporaries", name, itemsize=itemsize)

    if foreach:
        norms = _norms_at_once(timeline, parameters, itemsize)
    else:
        norms = [_norm(timeline, parameter, itemsize, resident_threads) for parameter in parameters]
    num_bytes = len(parameters) * itemsize
    joined = timeline.alloc(num_bytes, "optimizer_temporaries", "norms of the gradients", itemsize=itemsize)
    total = scalar("norm of all gradients")
    timeline.free(joined, *norms)
    shifted, inverse, factor = scalar("norm plus epsilon"), scalar("inverse of the norm"), scalar("factor")
    timeline.free(inverse, shifted)
    clamped = scalar("factor of at most one")
    timeline.free(factor, clamped, total)


def _norms_at_once(timeline: TimelineBuilder, parameters: Sequence[Parameter], itemsize: int) -> list[int]:
    chunks = -(-max(parameter.numel for parameter in parameters) // _CHUNK)
    num_bytes = 4 * len(parameters) * chunks
    parts = timeline.alloc(num_bytes, "optimizer_temporaries", "norms of the gradients' chunks", itemsize=4)
    norms = [
        timeline.alloc(itemsize, "optimizer_temporaries", _name(parameter), itemsize=itemsize)
        for parameter in parameters
    ]
    timeline.free(parts)
    return norms


def _norm(timeline: TimelineBuilder, parameter: Parameter, itemsize: int, resident_threads: int) -> int:
    norm = timeline.alloc(itemsize, "optimizer_temporaries", _name(parameter), itemsize=itemsize)
    buffers = whole_reduction_bytes(parameter.numel, resident_threads=resident_threads)
    held = [timeline.alloc(num_bytes, "workspace", f"{_name(parameter)}: sums") for num_bytes in buffers if num_bytes]
    timeline.free(*reversed(held))
    return norm


def _name(parameter: Parameter) -> str:
    return f"norm of the gradient of {parameter.name}"
