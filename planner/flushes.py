"""How often a step that fits has the allocator give its cache back, and which changes spare that.

A request for which neither the cache nor the driver has room makes torch's allocator wait for the GPU, give back every
cached segment that no tensor touches, and ask the driver again; what it gave back is asked for anew soon after.

Source: pytorch `c10/cuda/CUDACachingAllocator.cpp` (`release_cached_blocks`, `num_alloc_retries`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from optplan.planner.candidates import Candidate, bind_candidate
from optplan.planner.errors import ConfigError
from optplan.planner.request import StepRequest, change_request
from optplan.planner.sharding.clusters import usual_num_nodes
from optplan.planner.sharding.registry import FULL_SHARDINGS
from optplan.planner.sharding.search import little_padding, possible_counts, with_expandable_segments
from optplan.planner.workload import Workload

_MORE_GPUS = (1.5, 2.0)
"""Shares of the GPUs asked for of which the next larger number is tried."""


def flush_note(workload: Workload, candidate: Candidate, *, tries_changes: bool) -> str | None:
    """What is to be known of a step that fits because the allocator gives its cache back; None of any other.

    Args:
        workload: The step.
        candidate: The optimizer.
        tries_changes: Whether changes are simulated that could spare it; only those that do are named.
    """
    count = workload.num_flushes(candidate)
    if not count:
        return None
    note = (
        f"fits, but {_times(count)} in a steady step a request finds no room until the allocator has given its cache "
        "back (torch's num_alloc_retries): each time the host waits for the GPU, which slows the step and is in no "
        "predicted time"
    )
    return "; ".join([note, *(_spared(workload, candidate, count) if tries_changes else [])])


def _spared(workload: Workload, candidate: Candidate, count: int) -> list[str]:
    """The first change with which it does not happen, and before it the one that leaves the least, if that is less."""
    least, parts = count, list[str]()
    for words, settings in _changes(workload.request):
        left = _left_with(workload, candidate, settings)
        if left is None or left >= least:
            continue
        if left == 0:
            return [*parts, f"with {words} it does not happen"]
        least, parts = left, [f"with {words} it is {_times(left)}"]
    return parts


def _left_with(workload: Workload, candidate: Candidate, settings: Mapping[str, Any]) -> int | None:
    """How often it happens with some settings changed, None if the step does not come through then."""
    try:
        other = workload.at(change_request(workload.request, settings))
        return other.num_flushes(bind_candidate(other.request, candidate.optimizer))
    except ConfigError:
        return None


def _changes(request: StepRequest) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Changes to try in words and as settings, the nearest first."""
    config, conf = request.config, with_expandable_segments(request)
    if conf is not None:
        yield f"--alloc-conf {conf}", {"alloc_conf": conf}
    if config.batch_size % 2 == 0:
        half = {"batch_size": config.batch_size // 2, "grad_accum": config.grad_accum * 2}
        yield f"--batch-size {half['batch_size']} --grad-accum {half['grad_accum']}", half
    if config.sharding in FULL_SHARDINGS and config.tensor_parallel * config.pipeline_parallel == 1:
        for num_gpus in _more_gpus(request):
            nodes = usual_num_nodes(num_gpus, request.gpu.id)
            yield f"{num_gpus:,} GPUs{f' on {nodes} nodes' if nodes > 1 else ''}", {"gpus": num_gpus, "nodes": nodes}


def _more_gpus(request: StepRequest) -> list[int]:
    asked = request.config.gpus
    counts = little_padding(request.model, possible_counts(request.gpu.id, most=3 * asked))
    larger = [next((count for count in counts if count >= share * asked), None) for share in _MORE_GPUS]
    return list(dict.fromkeys(count for count in larger if count is not None))


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"
