"""Exact answers for the steps around the one asked for, so that a page can switch between them without a formula."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import Any

import msgspec

from optplan.planner.candidates import Candidate, bind_candidate
from optplan.planner.errors import ConfigError
from optplan.planner.gpus import Gpu, load_gpu, load_gpus
from optplan.planner.optimizers.base import OptimizerModel
from optplan.planner.recommend import command_of
from optplan.planner.request import StepRequest, change_request
from optplan.planner.requested_step import step_options
from optplan.planner.timeline import Category, Phase
from optplan.planner.workload import StepPeaks, Workload

WORK = 450_000
"""Events of steps that the whole grid may simulate besides those that are known: half a second of one core or so."""

_SHARE_WITHIN_LIMIT = 0.1
"""Of the work, how much are events of steps that are taken again within the limit, each some six times."""

_MOST_ANSWERS = 48
"""Combinations that are simulated at most, each the answer for several GPUs: a page should stay small."""

_PREPARATION = 1.6
"""What a step's shared part costs, counted in simulations of one optimizer."""

_USUAL_GPUS = ("a100-40g", "h100-80g", "rtx-4090-24g", "l40s-48g")

_GROWTH = (
    "checkpointing", "optimizer", "batch_size", "seq_len", "gpu", "optimizer", "batch_size", "optimizer", "batch_size",
    "seq_len", "gpu", "optimizer", "seq_len", "gpu",
)  # fmt: skip
"""Which axis gets its next value, one after another, where the grid then stays within `WORK`."""


class WhatIfCell(msgspec.Struct, frozen=True, kw_only=True):
    """One exact answer: the first five fields say what it is of, the others are those of an estimate.

    Attributes:
        fits: The verdict of an estimate; None where the step has room by bytes, but so little that only steps simulated
            within the limit could tell, and there were too many of those.
    """

    gpu: str
    optimizer: str
    batch_size: int
    seq_len: int
    checkpointing: str
    peak_allocated_bytes: int
    peak_phase: Phase
    peak_categories: dict[Category, int]
    peak_reserved_bytes: int
    usable_bytes: int
    headroom_bytes: int
    fits: bool | None
    command: str


class WhatIf(msgspec.Struct, frozen=True, kw_only=True):
    """Answers for the combinations of the axes.

    Attributes:
        axes: The values of each axis, named as the fields of a cell.
        start: The value of each axis that was asked for.
        cells: The answers; a combination that cannot run is missing.
    """

    axes: dict[str, list[Any]]
    start: dict[str, Any]
    cells: list[WhatIfCell]


def what_if(
    request: StepRequest, optimizers: Sequence[OptimizerModel], *, work: int = WORK, known: Sequence[Workload] = ()
) -> WhatIf | None:
    """The grid around a request, None for a family without step rules.

    Args:
        request: The step that was asked for.
        optimizers: What may be switched to, the one to start with first; no two of one name.
        work: How much may be simulated, in events.
        known: Workloads of this request but for its `config`, which remember what they have been asked already.
    """
    asked = next((workload for workload in known if _is_of(workload, request)), None) or Workload(request)
    if request.engine != "rules" or not asked.has_rules:
        return None
    axes = _axes(request, optimizers, budget=work / asked.num_events, num_known=min(1, len(known)))
    verdicts = _Verdicts(int(work * _SHARE_WITHIN_LIMIT))
    steps = _steps(request, axes, known)
    cells = [cell for step in steps for cell in _cells(step, axes["optimizer"], axes["gpu"], verdicts)]
    if not cells:
        return None
    config = request.config
    start = {name: getattr(config, name) for name in ("batch_size", "seq_len", "checkpointing")}
    return WhatIf(
        axes={
            "optimizer": [optimizer.id for optimizer in axes["optimizer"]],
            "batch_size": sorted(axes["batch_size"]),
            "seq_len": sorted(axes["seq_len"]),
            "checkpointing": axes["checkpointing"],
            "gpu": [gpu.id for alike in axes["gpu"] for gpu in alike],
        },
        start={"gpu": request.gpu.id, "optimizer": optimizers[0].id, **start},
        cells=cells,
    )


def _axes(
    request: StepRequest, optimizers: Sequence[OptimizerModel], *, budget: float, num_known: int
) -> dict[str, list[Any]]:
    """The values of each axis, grown from the request one at a time while the work stays within the budget."""
    wanted: dict[str, list[Any]] = {
        "batch_size": _batch_sizes(request.config.batch_size),
        "seq_len": _seq_lens(request),
        "checkpointing": list(dict.fromkeys((request.config.checkpointing, "none", "full"))),
        "optimizer": list(optimizers),
        "gpu": _gpus(request.gpu),
    }
    lengths = dict.fromkeys(wanted, 1)
    for name in _GROWTH:
        more = lengths | {name: lengths[name] + 1}
        is_small = prod(more.values()) <= _MOST_ANSWERS and _work(more, num_known) <= budget
        if more[name] <= len(wanted[name]) and is_small:
            lengths = more
    return {name: values[: lengths[name]] for name, values in wanted.items()}


def _work(lengths: dict[str, int], num_known: int) -> float:
    """What a grid costs, counted in simulations of one optimizer; the steps that are known cost nothing."""
    steps = prod(length for name, length in lengths.items() if name != "optimizer")
    return max(0, steps - num_known) * (_PREPARATION + lengths["optimizer"])


def _batch_sizes(asked: int) -> list[int]:
    return list(dict.fromkeys((asked, 2 * asked, max(1, asked // 2), 4 * asked, 8 * asked)))


def _seq_lens(request: StepRequest) -> list[int]:
    asked, most = request.config.seq_len, request.model.max_seq_len
    longer = [length for length in (2 * asked, 4 * asked) if length <= most]
    return list(dict.fromkeys((asked, max(1, asked // 2), *longer, max(1, asked // 4))))


def _gpus(asked: Gpu) -> list[list[Gpu]]:
    """GPUs that a step cannot tell apart, in one list each, that of the GPU asked for first."""
    groups = [[asked, *(gpu for gpu in load_gpus().values() if _is_like(gpu, asked) and gpu.id != asked.id)]]
    for name in _USUAL_GPUS:
        usual = load_gpu(name)
        if not any(_is_like(usual, group[0]) for group in groups):
            groups.append([gpu for gpu in load_gpus().values() if _is_like(gpu, usual)])
    return groups


def _is_like(gpu: Gpu, other: Gpu) -> bool:
    """Whether the rules make the same step for both."""
    return _traits(gpu) == _traits(other) and gpu.vendor == other.vendor


def _traits(gpu: Gpu) -> tuple[object, ...]:
    return gpu.compute_capability, gpu.sm_count


def _steps(request: StepRequest, axes: dict[str, list[Any]], known: Sequence[Workload]) -> Iterator[Workload]:
    for batch_size, seq_len, checkpointing, alike in product(
        axes["batch_size"], axes["seq_len"], axes["checkpointing"], axes["gpu"]
    ):
        changes = {"batch_size": batch_size, "seq_len": seq_len, "checkpointing": checkpointing}
        try:
            step = change_request(msgspec.structs.replace(request, gpu=alike[0]), changes)
            step_options(step)
        except ConfigError:
            continue
        answered = next((workload for workload in known if _is_of(workload, step)), None)
        yield answered or (known[0].at(step) if known else Workload(step))


def _is_of(workload: Workload, step: StepRequest) -> bool:
    return (workload.request.config, workload.request.gpu) == (step.config, step.gpu)


class _Verdicts:
    """Whether steps fit: near the limit by simulating them within it, as long as the work for that suffices."""

    def __init__(self, num_events: int) -> None:
        self._left = num_events

    def of(self, step: Workload, candidate: Candidate, peaks: StepPeaks, *, like: Workload) -> bool | None:
        """The verdict of an estimate, None where the step has room by bytes and is not simulated.

        Args:
            step: On one GPU.
            candidate: With this optimizer.
            peaks: What it reaches.
            like: The same step, where it was simulated.
        """
        step.remember(candidate.optimizer, peaks)
        is_close = peaks.peak_bytes <= step.usable_bytes and peaks.most_reserved_bytes > step.request.gpu.usable_bytes
        if is_close and step.can_hold_to_limit():
            self._left -= like.num_events
            if self._left < 0:
                return None
        return step.fits(candidate)


def _cells(
    step: Workload, optimizers: Sequence[OptimizerModel], groups: list[list[Gpu]], verdicts: _Verdicts
) -> Iterator[WhatIfCell]:
    """The answers of one step, on every GPU on which it is the same."""
    alike = [_on(step, gpu) for gpu in next(group for group in groups if group[0].id == step.request.gpu.id)]
    for optimizer in optimizers:
        try:
            candidate = bind_candidate(step.request, optimizer)
            peaks = step.peaks(candidate)
        except ConfigError:
            continue
        if peaks is not None:
            for same in alike:
                yield _cell(same, candidate, peaks, fits=verdicts.of(same, candidate, peaks, like=step))


def _on(step: Workload, gpu: Gpu) -> Workload:
    """The same step on another GPU that is like its own."""
    if gpu.id == step.request.gpu.id:
        return step
    return step.at(change_request(msgspec.structs.replace(step.request, gpu=gpu), {}))


def _cell(step: Workload, candidate: Candidate, peaks: StepPeaks, *, fits: bool | None) -> WhatIfCell:
    config, usable_bytes = step.request.config, step.usable_bytes
    return WhatIfCell(
        gpu=step.request.gpu.id,
        optimizer=candidate.id,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        checkpointing=config.checkpointing,
        peak_allocated_bytes=peaks.peak_bytes,
        peak_phase=peaks.peak_phase,
        peak_categories=peaks.categories,
        peak_reserved_bytes=peaks.reserved_bytes,
        usable_bytes=usable_bytes,
        headroom_bytes=usable_bytes - peaks.peak_bytes,
        fits=fits,
        command=command_of(step, candidate),
    )
