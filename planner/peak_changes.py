"""What would lower the peak of one step, and by how much: each change tried on the step itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from optplan.planner.candidates import Candidate, OptimizerChoice, choose_optimizers
from optplan.planner.errors import ConfigError
from optplan.planner.records import StepConfig
from optplan.planner.request import StepRequest, change_request
from optplan.planner.timeline import Category
from optplan.planner.timeline_report import PeakChange
from optplan.planner.workload import Workload

_LEAST_SHARE = 0.002
"""A change that lowers the peak by less than this share is not worth naming."""


class _Change(NamedTuple):
    """One change to try.

    Attributes:
        text: The options to add or change.
        addresses: The category that it makes smaller; it is tried only if the peak holds some.
        why: What it does.
        settings: What it sets in the step's configuration.
        optimizer: The optimizer and implementation that it takes instead, as on the command line.
    """

    text: str
    addresses: Category
    why: str
    settings: Mapping[str, Any] = {}
    optimizer: tuple[str, ...] = ()


_STEP_CHANGES = (
    _Change(
        "--checkpointing full", "activations", "keeps one input a layer, the rest is computed again in backward",
        {"checkpointing": "full"},
    ),
    _Change(
        "--checkpointing selective", "activations", "keeps one input of every second layer, which is computed again",
        {"checkpointing": "selective"},
    ),
    _Change(
        "--attention sdpa", "activations", "never holds the matrix of attention weights", {"attention": "sdpa"}
    ),
    _Change(
        "--fused-loss liger", "logits_and_loss", "makes the head's gradients in the forward, chunk by chunk",
        {"fused_loss": "liger"},
    ),
    _Change(
        "--fused-loss chunked", "logits_and_loss", "holds the logits of an eighth of the tokens, made again later",
        {"fused_loss": "chunked"},
    ),
    _Change(
        "--step-in-backward", "gradients", "updates each parameter as its gradient comes, and frees it",
        {"step_in_backward": True},
    ),
)  # fmt: skip
_IMPLEMENTATION = _Change(
    "--set implementation=fused", "optimizer_temporaries", "updates in place, without copies of the parameters"
)
_OPTIMIZERS = ("adam-mini", "adapprox", "adamw-8bit", "micro-adam")


def peak_changes(workload: Workload, candidate: Candidate, *, peak_bytes: int) -> list[PeakChange]:
    """The changes of the step that lower its peak, the most effective first.

    Only what is alive at the peak is addressed: a change that makes smaller what has long been freed by then lowers
    nothing, and is not listed.
    """
    peaks = workload.peaks(candidate)
    if peaks is None:
        return []
    found = []
    for change in _changes(workload.request, candidate):
        if not peaks.categories.get(change.addresses):
            continue
        lowered = _peak_with(workload, candidate, change)
        if lowered is not None and peak_bytes - lowered > _LEAST_SHARE * peak_bytes:
            found.append(PeakChange(change.text, change.addresses, change.why, lowered, peak_bytes - lowered))
    return sorted(found, key=lambda change: -change.saved_bytes)


def _changes(request: StepRequest, candidate: Candidate) -> Iterator[_Change]:
    config = request.config
    for change in _STEP_CHANGES:
        if any(getattr(config, name) != value for name, value in change.settings.items()):
            yield change
    if config.batch_size > 1 and not config.step_in_backward:
        yield _smaller_batch(config)
    if candidate.implementation in ("foreach", "for-loop"):
        yield _IMPLEMENTATION._replace(optimizer=(candidate.id, "implementation=fused"))
    for name in _OPTIMIZERS:
        if name != candidate.id:
            yield _Change(f"--optimizer {name}", "optimizer_state", "keeps less state", optimizer=(name,))


def _smaller_batch(config: StepConfig) -> _Change:
    """Half the micro-batch with twice the accumulation, or one sequence where the batch is odd."""
    divisor = 2 if config.batch_size % 2 == 0 else config.batch_size
    size, accumulated = config.batch_size // divisor, config.grad_accum * divisor
    return _Change(
        f"--batch-size {size} --grad-accum {accumulated}",
        "activations",
        "the same sequences a step in smaller micro-batches",
        {"batch_size": size, "grad_accum": accumulated},
    )


def _peak_with(workload: Workload, candidate: Candidate, change: _Change) -> int | None:
    """The peak with the change, None where it cannot be run or its peak is not known."""
    try:
        other = workload.at(change_request(workload.request, change.settings))
        if not change.optimizer:
            (same,), _ = other.candidates([OptimizerChoice(candidate.optimizer, explicit=True)])
            return _peak(other, same)
        name, *settings = change.optimizer
        (instead,), _ = other.candidates(choose_optimizers(name, settings or None))
        return _peak(other, instead)
    except ConfigError:
        return None


def _peak(workload: Workload, candidate: Candidate) -> int | None:
    peaks = workload.peaks(candidate)
    return None if peaks is None else peaks.peak_bytes
