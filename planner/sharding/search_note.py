"""What an estimate on several GPUs that does not fit says of the number on which it would."""

from __future__ import annotations

from optplan.planner.candidates import Candidate
from optplan.planner.errors import ConfigError
from optplan.planner.request import StepRequest
from optplan.planner.sharding.clusters import usual_num_nodes
from optplan.planner.sharding.registry import FULL_SHARDINGS
from optplan.planner.sharding.search import MOST_GPUS, FewestGpus, smallest_fitting, with_expandable_segments
from optplan.planner.units import format_bytes
from optplan.planner.workload import Workload


def fewest_gpus_note(workload: Workload, candidate: Candidate) -> str | None:
    """On how many GPUs a step fits that does not fit on those asked for; None where that is not known.

    The step stays fully sharded if it is, else it becomes so; layers are not divided.
    """
    request, config = workload.request, workload.request.config
    if config.gpus == 1 or request.engine != "rules" or request.gpu.is_budget:
        return None
    sharding = config.sharding if config.sharding in FULL_SHARDINGS else "fsdp2"
    try:
        found = smallest_fitting(request, candidate.optimizer, sharding=sharding, known=workload)
    except ConfigError:
        return None
    parts = [_answer(found, request, sharding), _fragmentation(found), _expandable(found, request)]
    return "; ".join(filter(None, parts))


def _answer(found: FewestGpus, request: StepRequest, sharding: str) -> str:
    """The number that fits, and the largest that has no room by bytes."""
    most, fitting = found.most_without_room, found.fitting
    lacking = f", {'one has' if most == 1 else f'{most:,} have'} no room" if most else ""
    if fitting is not None and fitting.num_gpus == 1:
        return "one GPU alone fits"
    if fitting is not None:
        return f"{_gpus(fitting.num_gpus, request)} fit with --sharding {sharding}{lacking}"
    if found.shortages:
        return f"no number of GPUs that was tried fits with --sharding {sharding}{lacking}"
    return f"no number of GPUs up to {MOST_GPUS:,} has room with --sharding {sharding}: what every rank needs is more"


def _fragmentation(found: FewestGpus) -> str:
    """Why numbers with room by bytes were refused, if any were."""
    refused = sorted(found.shortages)
    if not refused:
        return ""
    first, verb = "one" if refused[0] == 1 else f"{refused[0]:,}", "has" if refused == [1] else "have"
    others = f" and {refused[1]:,}" if len(refused) == 2 else f" and the {len(refused) - 1} numbers tried after it"
    needed = format_bytes(found.shortages[refused[0]].requested_bytes)
    subject = first if len(refused) == 1 else first + others
    fitting = found.fitting.num_gpus if found.fitting is not None and found.leaps else None
    skipped = f", and no number from there to {fitting:,} was tried" if fitting else ""
    return f"{subject} {verb} room by bytes, but fragmentation leaves none for a request of {needed}{skipped}"


def _expandable(found: FewestGpus, request: StepRequest) -> str:
    if found.expandable is None:
        return ""
    verb = "fits" if found.expandable == 1 else "fit"
    return f"with --alloc-conf {with_expandable_segments(request)} {_gpus(found.expandable, request)} {verb}"


def _gpus(num_gpus: int, request: StepRequest) -> str:
    if num_gpus == 1:
        return "one GPU"
    nodes = usual_num_nodes(num_gpus, request.gpu.id)
    return f"{num_gpus:,} GPUs{f' on {nodes} nodes' if nodes > 1 else ''}"
