"""How fast this GPU copies memory: what the optimizer's step is held against."""

from __future__ import annotations

from statistics import median

import torch

from optplan.planner.units import MIB

_SIZES = tuple(size * MIB for size in (1024, 512, 256))
"""Bytes that may be copied, the most first. Of fewer, a good part would stay in the caches of the largest GPUs."""
_SHARE = 8
"""A copy takes no more than one part in so many of the memory that is free, read or written."""
_NUM_COPIES = 12


def copy_bandwidth(device: torch.device) -> float | None:
    """Bytes read plus bytes written a second by a copy within the GPU, the median of several; None without room for it.

    The driver does not know of a limit that is set on this process's share (`set_per_process_memory_fraction`): what
    cannot be had is tried smaller. What was needed is given back to the driver, with all that torch's allocator had in
    store before, so that what follows always finds the same.
    """
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    for size in _SIZES:
        seconds = _copy_seconds(size, device) if size <= free // _SHARE else None
        torch.cuda.empty_cache()
        if seconds is not None:
            return 2 * size / seconds
    return None


def _copy_seconds(size: int, device: torch.device) -> float | None:
    """Median time of a copy of so many bytes, None if they cannot be had."""
    try:
        source = torch.empty(size, dtype=torch.uint8, device=device)
        target = torch.empty(size, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        return None
    return median(_timed_copy(source, target) for _ in range(_NUM_COPIES))


def _timed_copy(source: torch.Tensor, target: torch.Tensor) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    target.copy_(source)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000
