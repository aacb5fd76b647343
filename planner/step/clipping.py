"""What `torch.nn.utils.clip_grad_norm_` allocates on the device: norms and a factor, no gradient's copy.

Source: pytorch `torch/nn/utils/clip_grad.py` (foreach, the default on CUDA) and `native/cuda/ForeachReduceOp.cu`;
sizes as recorded on an H200.
"""

from __future__ import annotations

from collections.abc import Sequence

from optplan.planner.dtypes import ITEMSIZE_BYTES, Dtype
from optplan.planner.tensors import Parameter
from optplan.planner.timeline import TimelineBuilder

_CHUNK = 65_536
"""Elements that one thread block of a foreach norm takes."""


def write_clipping(timeline: TimelineBuilder, parameters: Sequence[Parameter], *, dtype: Dtype) -> None:
    """Append, in phase clip, the norm of all gradients of this dtype and their scaling in place."""
    timeline.phase = "clip"
    itemsize, count = ITEMSIZE_BYTES[dtype], len(parameters)
    chunks = -(-max(parameter.numel for parameter in parameters) // _CHUNK)

    def scalar(name: str) -> int:
        return timeline.alloc(itemsize, "optimizer_temporaries", name, itemsize=itemsize)

    parts = timeline.alloc(4 * count * chunks, "optimizer_temporaries", "norms of the gradients' chunks", itemsize=4)
    norms = [scalar(f"norm of the gradient of {parameter.name}") for parameter in parameters]
    timeline.free(parts)
    joined = timeline.alloc(count * itemsize, "optimizer_temporaries", "norms of the gradients", itemsize=itemsize)
    total = scalar("norm of all gradients")
    timeline.free(joined, *norms)
    shifted, inverse, factor = scalar("norm plus epsilon"), scalar("inverse of the norm"), scalar("factor")
    timeline.free(shifted, inverse)
    clamped = scalar("factor of at most one")
    timeline.free(clamped, factor, total)
