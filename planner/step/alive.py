"""What is alive at a phase's peak, on top of the resident tensors: the lines that `optplan explain` prints."""

from __future__ import annotations

from optplan.planner.allocator.caching import ROUNDING
from optplan.planner.dtypes import Dtype
from optplan.planner.explanation import ExplainedLine, explained_line
from optplan.planner.footprint import pattern_of
from optplan.planner.models.spec import ModelSpec
from optplan.planner.optimizers.base import OptimizerContext, OptimizerModel
from optplan.planner.sharding.base import Strategy
from optplan.planner.sharding.rank import updated_parameters, write_rank_step
from optplan.planner.step.rules import StepOptions, write_forward_backward, write_load
from optplan.planner.timeline import Allocation, Phase, Timeline, TimelineBuilder
from optplan.planner.units import round_up


def alive_at_peak(
    spec: ModelSpec,
    options: StepOptions,
    phase: Phase,
    *,
    optimizer: OptimizerModel,
    context: OptimizerContext,
    master: Dtype | None,
    strategy: Strategy | None = None,
) -> list[ExplainedLine]:
    """The allocations alive at the peak of `phase`, those alike but for the layer in one line; bytes as allocated."""
    timeline = TimelineBuilder("load")
    write_load(timeline, spec, options, strategy)
    write_forward_backward(timeline, spec, options, strategy)
    timeline.phase = "step"
    updated = updated_parameters(spec.unique_parameters, strategy)
    write_rank_step(timeline, optimizer, updated, context, master=master, strategy=strategy)
    return _lines(_alive(timeline.events, phase), options.batch_size * options.seq_len)


def _alive(events: Timeline, phase: Phase) -> list[Allocation]:
    """The allocations alive at the first moment of `phase` at which most bytes are allocated."""
    live: dict[int, Allocation] = {}
    in_use = 0
    peak, at_peak = -1, list(live.values())
    for event in events:
        if isinstance(event, Allocation):
            live[event.id] = event
            in_use += round_up(event.bytes, ROUNDING)
        else:
            in_use -= round_up(live.pop(event.id).bytes, ROUNDING)
        if event.phase == phase and in_use > peak:
            peak, at_peak = in_use, list(live.values())
    return [allocation for allocation in at_peak if (allocation.category, allocation.phase) != ("parameters", "load")]


def _lines(alive: list[Allocation], num_tokens: int) -> list[ExplainedLine]:
    counts: dict[tuple[str, int, int], int] = {}
    for allocation in alive:
        key = (f"{pattern_of(allocation.name)} ({allocation.category})", allocation.bytes, allocation.itemsize)
        counts[key] = counts.get(key, 0) + 1
    return [
        explained_line(name, round_up(size, ROUNDING), _formula(size, itemsize, num_tokens), count=count)
        for (name, size, itemsize), count in counts.items()
    ]


def _formula(num_bytes: int, itemsize: int, num_tokens: int) -> str:
    """The bytes requested as tokens x width x itemsize where they are so many, and what the allocator makes of them."""
    elements = num_bytes // itemsize
    width, rest = divmod(elements, num_tokens)
    product = f"{num_tokens} tokens x {width}" if width and not rest else str(elements)
    rounded = "" if num_bytes % ROUNDING == 0 else f", rounded up to {round_up(num_bytes, ROUNDING)} B"
    return f"{product} x {itemsize} B{rounded}"
