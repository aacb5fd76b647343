"""The smallest number of GPUs on which a step fits, found by trying."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

import msgspec

from optplan.planner.candidates import bind_candidate
from optplan.planner.errors import ConfigError
from optplan.planner.models.spec import ModelSpec
from optplan.planner.optimizers.base import OptimizerModel
from optplan.planner.request import StepRequest, change_request
from optplan.planner.sharding.clusters import cluster_of, usual_num_nodes
from optplan.planner.sharding.registry import FULL_SHARDINGS
from optplan.planner.workload import Workload

MOST_GPUS = 16_384
MOST_PADDING = 0.01
"""Share of the parameters that padding may add on a number of GPUs that is tried under full sharding: where it adds
more, as many GPUs can need more memory each than fewer, whose gathered layers are smaller."""


class Fitting(msgspec.Struct, frozen=True):
    """A number of GPUs on which a step fits.

    Attributes:
        num_gpus: GPUs of all nodes.
        num_nodes: Machines.
        sharding: How they divide the work; `none` on one.
        peak_bytes: Peak allocated bytes of the first rank.
        tried: Numbers of GPUs that were tried, and whether the step fits on each.
    """

    num_gpus: int
    num_nodes: int
    sharding: str
    peak_bytes: int
    tried: dict[int, bool]


def possible_counts(gpu: str, *, most: int = MOST_GPUS) -> list[int]:
    """Numbers of GPUs that can be rented together: up to a machine's any, then whole machines."""
    per_node = cluster_of(gpu).gpus_per_node
    return [count for count in [*range(1, per_node), *range(per_node, most + 1, per_node)] if count <= most]


def little_padding(model: ModelSpec, counts: Sequence[int]) -> list[int]:
    """Those of the numbers of ranks for which padding the rows of every parameter adds little; one always does."""
    sizes = Counter((parameter.shape[0] if parameter.shape else 1, parameter.numel) for parameter in model.parameters)

    def padding(count: int) -> float:
        added = sum(times * numel * (-rows % count) / rows for (rows, numel), times in sizes.items())
        return added / model.num_parameters

    return [count for count in counts if padding(count) <= MOST_PADDING]


def smallest_fitting(
    request: StepRequest, optimizer: OptimizerModel, *, sharding: str = "fsdp2", most: int = MOST_GPUS
) -> Fitting | None:
    """The smallest number of GPUs on which the request's step fits with this optimizer; None if none does.

    The micro-batch of each GPU stays as it is. One GPU is tried first, without sharding; then numbers are bisected,
    under full sharding those that deal out the rows with little padding; the answer is the first that fits and whose
    predecessor does not.

    Args:
        request: The step; its own number of GPUs and how they divide the work do not matter.
        optimizer: Built, bound to the model or not.
        sharding: How several GPUs divide the work.
        most: Largest number to try.

    Raises:
        ConfigError: The model's family has no step rules, or the optimizer cannot run the step on several GPUs.
    """
    counts = possible_counts(request.gpu.id, most=most)
    if sharding in FULL_SHARDINGS:
        counts = little_padding(request.model, counts)
    search = _Search(request, optimizer, sharding)
    if search.fits(1):
        return search.result(1)
    found = bisect_left(counts, True, lo=1, key=search.fits)
    return None if found == len(counts) else search.result(counts[found])


class _Search:
    """Numbers of GPUs tried so far."""

    def __init__(self, request: StepRequest, optimizer: OptimizerModel, sharding: str) -> None:
        self._request, self._optimizer, self._sharding = request, optimizer, sharding
        self._tried: dict[int, bool] = {}

    def fits(self, num_gpus: int) -> bool:
        """Whether the step fits on each of so many."""
        if num_gpus not in self._tried:
            self._tried[num_gpus] = self._try(num_gpus)
        return self._tried[num_gpus]

    def _try(self, num_gpus: int) -> bool:
        request = self._on(num_gpus)
        workload = Workload(request)
        candidate = bind_candidate(workload.request, self._optimizer)
        if not workload.has_rules:
            raise ConfigError(f"{request.model.model_type} models have no step rules: how many GPUs they need is open")
        # By bytes: where whole parameters of many gigabytes pass through the cache depends on how the model is loaded.
        return workload.has_room(candidate, request.config.batch_size)

    def _on(self, num_gpus: int) -> StepRequest:
        sharding = self._sharding if num_gpus > 1 else "none"
        nodes = usual_num_nodes(num_gpus, self._request.gpu.id)
        alone = {"tensor_parallel": 1, "sequence_parallel": False, "pipeline_parallel": 1}
        settings = {"gpus": num_gpus, "nodes": nodes, "sharding": sharding}
        return change_request(self._request, settings | alone)

    def result(self, num_gpus: int) -> Fitting:
        """The answer, with what was tried for it."""
        request = self._on(num_gpus)
        workload = Workload(request)
        peaks = workload.peaks(bind_candidate(workload.request, self._optimizer))
        assert peaks is not None
        config = request.config
        return Fitting(num_gpus, config.nodes, config.sharding, peaks.peak_bytes, dict(sorted(self._tried.items())))


def fewest_gpus_note(request: StepRequest, optimizer: OptimizerModel) -> str | None:
    """On how many GPUs a step fits that does not fit on those asked for; None where that is not known.

    The step stays fully sharded if it is, else it becomes so; layers are not divided.
    """
    config = request.config
    if config.gpus == 1 or request.engine != "rules" or request.gpu.is_budget:
        return None
    sharding = config.sharding if config.sharding in FULL_SHARDINGS else "fsdp2"
    try:
        found = smallest_fitting(request, optimizer, sharding=sharding)
    except ConfigError:
        return None
    if found is None:
        return (
            f"no number of GPUs up to {MOST_GPUS:,} has room with --sharding {sharding}: what every rank needs is more"
        )
    if found.num_gpus == 1:
        return "one GPU alone has room"
    nodes = f" on {found.num_nodes} nodes" if found.num_nodes > 1 else ""
    before = max(count for count, fits in found.tried.items() if not fits)
    fewer = f"{before:,} have not" if before > 1 else "one has not"
    return f"{found.num_gpus:,} GPUs{nodes} have room by bytes with --sharding {sharding}, {fewer}"
