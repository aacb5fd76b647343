"""The smallest number of GPUs on which a step fits, found by trying.

Sums of rounded requests, which no peak is below, rule numbers out quickly. The others are asked for the verdict of an
estimate, one after another: near the limit it takes the first steps on a device that has no more, and what is cut up on
one number of GPUs need not be on the next.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

import msgspec

from optplan.planner.candidates import Candidate, bind_candidate
from optplan.planner.errors import ConfigError
from optplan.planner.models.spec import ModelSpec
from optplan.planner.optimizers.base import OptimizerModel
from optplan.planner.request import StepRequest, change_request
from optplan.planner.sharding.clusters import cluster_of, usual_num_nodes
from optplan.planner.sharding.registry import FULL_SHARDINGS
from optplan.planner.shortage import Shortage
from optplan.planner.workload import Workload

MOST_GPUS = 16_384
MOST_SIMULATED = 8
"""Numbers of GPUs whose verdict is asked one after another. If none of them fits, the first is tried that leaves so
much room that the limit is not simulated."""
_MANY_REFUSED, _MOST_EXPANDABLE = 3, 2
"""Where a number fits, how many fragmentation must refuse for expandable segments to be tried, and on how many then."""
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
    """

    num_gpus: int
    num_nodes: int
    sharding: str
    peak_bytes: int


class FewestGpus(msgspec.Struct, frozen=True):
    """What a search has found.

    Attributes:
        fitting: The smallest number of GPUs on which an estimate says that the step fits, None if none was found.
        tried: Numbers of GPUs that were decided, and whether the step fits on each.
        shortages: Those of them that have room by bytes all the same, and the request that fails.
        expandable: Where none fits or several are refused, the first of these on which an estimate says that it fits
            with expandable segments; None if neither of the two smallest is one.
        leaps: Whether numbers were left out before the one that fits, after too many had been simulated.
    """

    fitting: Fitting | None
    tried: dict[int, bool]
    shortages: dict[int, Shortage]
    expandable: int | None = None
    leaps: bool = False

    @property
    def most_without_room(self) -> int | None:
        """The largest number that is too small by bytes, below all that are not."""
        enough = min([count for count, fits in self.tried.items() if fits] + list(self.shortages), default=None)
        lacking = [count for count, fits in self.tried.items() if not fits and (enough is None or count < enough)]
        return max(lacking, default=None)


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
    request: StepRequest,
    optimizer: OptimizerModel,
    *,
    sharding: str = "fsdp2",
    most: int = MOST_GPUS,
    known: Workload | None = None,
) -> FewestGpus:
    """The smallest number of GPUs on which an estimate says that the request's step fits with this optimizer.

    The micro-batch of each GPU stays as it is. One GPU is tried first, without sharding; then numbers are bisected by
    rounded sums, under full sharding those that deal out the rows with little padding; from the first that these do not
    rule out the verdict is asked, of `MOST_SIMULATED` numbers at most.

    Args:
        request: The step; its own number of GPUs and how they divide the work do not matter.
        optimizer: Built, bound to the model or not.
        sharding: How several GPUs divide the work.
        most: Largest number to try.
        known: A workload that may have answered one of the requests to come.

    Raises:
        ConfigError: The model's family has no step rules, or the optimizer cannot run the step on several GPUs.
    """
    counts = possible_counts(request.gpu.id, most=most)
    if sharding in FULL_SHARDINGS:
        counts = little_padding(request.model, counts)
    search = _Search(request, optimizer, sharding, known)
    if search.may_fit(1) and search.fits(1):
        return search.result(1)
    first = bisect_left(counts, True, lo=1, key=search.may_fit)
    last = min(first + MOST_SIMULATED, len(counts))
    found = next((count for count in counts[first:last] if search.fits(count)), None)
    if found is None and last < len(counts):
        ample = bisect_left(counts, True, lo=last, key=search.has_room_to_spare)
        return search.result(next(filter(search.fits, counts[ample : ample + 1]), None), leaps=ample > last)
    return search.result(found)


def with_expandable_segments(request: StepRequest) -> str | None:
    """The allocator's settings with expandable segments; None where they are in use, or the GPU's driver has none."""
    if request.allocator_settings.expandable_segments or request.gpu.vendor != "nvidia":
        return None
    return ",".join(filter(None, [request.config.alloc_conf, "expandable_segments:True"]))


class _Search:
    """Numbers of GPUs tried so far."""

    def __init__(self, request: StepRequest, optimizer: OptimizerModel, sharding: str, known: Workload | None) -> None:
        self._request, self._optimizer, self._sharding, self._known = request, optimizer, sharding, known
        self._on: dict[int, tuple[Workload, Candidate]] = {}
        self._tried: dict[int, bool] = {}

    def may_fit(self, num_gpus: int) -> bool:
        """Whether the rounded sums leave it open that the step fits."""
        may = self._quick_bytes(num_gpus) <= self._at(num_gpus)[0].usable_bytes
        if not may:
            self._tried[num_gpus] = False
        return may

    def has_room_to_spare(self, num_gpus: int) -> bool:
        """Whether the rounded sums leave so much that the verdict will hardly be no."""
        return self._at(num_gpus)[0].leaves_room(self._quick_bytes(num_gpus))

    def fits(self, num_gpus: int) -> bool:
        """The verdict of an estimate."""
        workload, candidate = self._at(num_gpus)
        self._tried[num_gpus] = workload.sure_shortage(candidate) is None and workload.fits(candidate) is True
        return self._tried[num_gpus]

    def _quick_bytes(self, num_gpus: int) -> int:
        workload, candidate = self._at(num_gpus)
        return workload.rounded_peak_bytes(candidate)

    def _at(self, num_gpus: int) -> tuple[Workload, Candidate]:
        if num_gpus not in self._on:
            request = self._with(num_gpus)
            known = self._known
            workload = known if known is not None and known.request == request else Workload(request)
            candidate = bind_candidate(workload.request, self._optimizer)
            if not workload.has_rules:
                family = self._request.model.model_type
                raise ConfigError(f"{family} models have no step rules: how many GPUs they need is open")
            self._on[num_gpus] = workload, candidate
        return self._on[num_gpus]

    def _with(self, num_gpus: int) -> StepRequest:
        sharding = self._sharding if num_gpus > 1 else "none"
        nodes = usual_num_nodes(num_gpus, self._request.gpu.id)
        alone = {"tensor_parallel": 1, "sequence_parallel": False, "pipeline_parallel": 1}
        settings = {"gpus": num_gpus, "nodes": nodes, "sharding": sharding}
        return change_request(self._request, settings | alone)

    def result(self, num_gpus: int | None, *, leaps: bool = False) -> FewestGpus:
        """The answer, with what was tried for it."""
        tried = dict(sorted(self._tried.items()))
        shortages = self._shortages()
        asks = num_gpus is None or len(shortages) >= _MANY_REFUSED
        first = list(shortages)[:_MOST_EXPANDABLE] if asks else []
        expandable = next(filter(self._fits_expandable, first), None)
        return FewestGpus(None if num_gpus is None else self._fitting(num_gpus), tried, shortages, expandable, leaps)

    def _fits_expandable(self, num_gpus: int) -> bool:
        """The verdict with segments that grow, which are given back by the page."""
        workload, candidate = self._at(num_gpus)
        conf = with_expandable_segments(self._request)
        if conf is None:
            return False
        other = workload.at(change_request(workload.request, {"alloc_conf": conf}))
        return other.fits(bind_candidate(other.request, candidate.optimizer)) is True

    def _shortages(self) -> dict[int, Shortage]:
        """Of the numbers that do not fit, those that have room by bytes, and the request that fails."""
        found: dict[int, Shortage] = {}
        for count in sorted(count for count, fits in self._tried.items() if not fits):
            workload, candidate = self._at(count)
            if self._quick_bytes(count) > workload.usable_bytes:
                continue
            # Where a smaller number has room by bytes, so has this one: its peak need not be known.
            sure = workload.sure_shortage(candidate) if found else None
            shortage = sure or workload.shortage(candidate)
            if shortage is not None:
                found[count] = shortage
        return found

    def _fitting(self, num_gpus: int) -> Fitting:
        workload, candidate = self._at(num_gpus)
        peaks = workload.peaks(candidate)
        assert peaks is not None
        config = workload.request.config
        return Fitting(num_gpus, config.nodes, config.sharding, peaks.peak_bytes)
