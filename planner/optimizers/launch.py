"""The device table that lets one launch of our kernels serve many tensors.

Triton takes no list of pointers by value, so each step puts them in a table: the pointers of every tensor's lists
(parameter, gradient, state) with its number of elements and its ordinal, and for every chunk of elements the tensor it
belongs to and its offset. The table lives as long as the step; only its image on the host is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

from optplan.planner.optimizers.scratch import Scratch
from optplan.planner.tensors import Parameter
from optplan.planner.timeline import TimelineBuilder

CHUNK_NUMEL = 65_536
"""Elements of one chunk of the table."""

NUM_EXTRA_COLUMNS = 2
"""What a tensor's row holds beside its pointers: number of elements, ordinal."""

_POINTER_BYTES = 8  # the other two columns are int64 as well
_CHUNK_BYTES = 4 + 8  # int32 tensor index, int64 offset


def launch_table_bytes(parameters: Sequence[Parameter], *, num_lists: int) -> int:
    """Bytes of the table, which has no row for a tensor without elements.

    Args:
        parameters: The tensors of one launch.
        num_lists: Pointers a tensor needs: parameter, gradient, and each state tensor that is not in a flat buffer.
    """
    num_chunks = sum(-(-p.numel // CHUNK_NUMEL) for p in parameters)
    num_rows = sum(p.numel > 0 for p in parameters)
    return num_rows * (num_lists + NUM_EXTRA_COLUMNS) * _POINTER_BYTES + num_chunks * _CHUNK_BYTES


def write_launch_table(timeline: TimelineBuilder, parameters: Sequence[Parameter], *, num_lists: int) -> int:
    """Append the table's allocation and return its id; it is freed when the last launch is issued."""
    size = launch_table_bytes(parameters, num_lists=num_lists)
    return Scratch(timeline).alloc("all tensors", ("launch table", size))
