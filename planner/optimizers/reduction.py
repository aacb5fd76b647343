"""The buffers of torch's CUDA reductions among an optimizer's temporaries."""

from __future__ import annotations

import math

from optplan.planner.optimizers.scratch import Part, Scratch
from optplan.planner.reductions import column_reduction_bytes, whole_reduction_bytes
from optplan.planner.tensors import Parameter


def write_whole_reduction(scratch: Scratch, parameter: Parameter, part: Part) -> int:
    """Append a reduction of a whole tensor to one element, such as its norm, and return the id of the result."""
    result = scratch.alloc(parameter, part)
    write_reduction_buffers(scratch, parameter, whole_reduction_bytes(parameter.numel))
    return result


def write_column_reduction(scratch: Scratch, parameter: Parameter, part: Part) -> int:
    """Append a reduction over the last dimension but one, such as the means of columns; return the result's id."""
    result = scratch.alloc(parameter, part)
    rows, columns = parameter.shape[-2:]
    sizes = column_reduction_bytes(rows, columns, matrices=math.prod(parameter.shape[:-2]))
    write_reduction_buffers(scratch, parameter, sizes)
    return result


def write_reduction_buffers(scratch: Scratch, parameter: Parameter, sizes: tuple[int, int]) -> None:
    """Append the buffers of one reduction, if it needs any; its output is the caller's and is allocated first."""
    if any(sizes):
        buffer = scratch.alloc(parameter, ("CUDA reduction buffer", sizes[0]))
        semaphores = scratch.alloc(parameter, ("CUDA reduction semaphores", sizes[1]))
        scratch.free(semaphores, buffer)
