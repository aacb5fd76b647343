"""How fast this GPU copies memory: what the optimizer's step is held against."""

from __future__ import annotations

from statistics import median

import torch

_LARGEST_BYTES = 2**30
_NUM_COPIES = 12


def copy_bandwidth(device: torch.device) -> float | None:
    """Bytes read plus bytes written a second by a copy within the GPU, the median of several; None without room for it.

    What the copy needed is given back to the driver.
    """
    free, _ = torch.cuda.mem_get_info(device)
    size = min(_LARGEST_BYTES, free // 8)
    if size < 2**24:
        return None
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = sorted(_timed_copy(source, target) for _ in range(_NUM_COPIES))
    del source, target
    torch.cuda.empty_cache()
    return 2 * size / median(seconds)


def _timed_copy(source: torch.Tensor, target: torch.Tensor) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    target.copy_(source)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000
