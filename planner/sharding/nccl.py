"""Device memory that NCCL takes beside torch's allocator: channels and their buffers, per communicator.

Two H200s in one node with one communicator took 847 MiB more than one H200 with the same step: measured. Elsewhere
this figure stands for every communicator, as an estimate: buffers grow with channels and connections, which differ by
topology.

Source: device memory of four measured steps on two H200s (1613 to 1615 MiB outside the allocator) less that of steps on
one (766.8 MiB); reported figures from 544 MB (two A100s) to 1.6 GB lie around it
(https://github.com/NVIDIA/nccl/issues/864, https://github.com/NVIDIA/nccl/issues/964).
"""

from __future__ import annotations

from typing import Literal

import msgspec

from optplan.planner.sharding.base import Ranks
from optplan.planner.units import MIB

COMMUNICATOR_BYTES = 847 * MIB


class NcclMemory(msgspec.Struct, frozen=True):
    """What NCCL takes of one GPU.

    Attributes:
        bytes: All communicators together.
        num_communicators: Groups of ranks that exchange data.
        basis: `measured` for two H200s in one node, else `estimated`.
    """

    bytes: int
    num_communicators: int
    basis: Literal["measured", "estimated"]


def nccl_memory(ranks: Ranks, *, num_communicators: int = 1, gpu: str = "") -> NcclMemory:
    """What NCCL takes on each of these GPUs; nothing on a single one."""
    if ranks.num_gpus == 1:
        return NcclMemory(0, 0, "measured")
    is_measured = gpu == "h200-141g" and ranks == Ranks(2) and num_communicators == 1
    basis: Literal["measured", "estimated"] = "measured" if is_measured else "estimated"
    return NcclMemory(num_communicators * COMMUNICATOR_BYTES, num_communicators, basis)
