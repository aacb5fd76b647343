"""The configuration to run: the best-established optimizer that fits with room to spare, and the reasons.

The order of preference is that of the evidence, not a score: AdamW itself, then optimizers that keep its
hyperparameters, then those that ask for a learning rate of their own or have been shown on fewer tasks, then one that
may leave the device, then those that restrict the update. Within one tier a step without recomputation goes first,
then the order in which the tier names them. A step counts as fitting with room when 5 % of the usable bytes stay free,
because the allocator reserves more than it hands out (1 to 5 % in most measured steps).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

import msgspec

from optplan.planner.candidates import Candidate
from optplan.planner.optimizers.facts import load_facts
from optplan.planner.records import Recommendation
from optplan.planner.request import default_attention, default_seq_len
from optplan.planner.units import format_gib
from optplan.planner.workload import Workload

ROOM = 0.05
"""Share of the usable bytes that a recommended step leaves free."""

TIERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("AdamW itself: nothing about the training changes", ("adamw",)),
    ("takes AdamW's hyperparameters unchanged", ("adam-mini", "adamw-8bit", "flash-adamw", "adamw-fp8")),
    (
        "asks for a learning rate of its own, or has been shown on fewer tasks",
        ("micro-adam", "adapprox", "adamw-4bit", "came", "adafactor", "lion", "soap", "muon"),
    ),
    ("its state may be evicted to the host, and each step then moves it over the host link", ("paged-adamw-8bit",)),
    ("restricts the update to a subspace or drops information", ("apollo", "galore", "sm3", "sgd")),
)
"""Optimizers by what a change to them costs, cheapest change first."""


class _Option(msgspec.Struct, frozen=True):
    tier: int
    rank: tuple[int, int]
    candidate: Candidate
    workload: Workload
    peak_bytes: int


def recommend(workload: Workload, candidates: Sequence[Candidate]) -> Recommendation | None:
    """The configuration to run among the candidates, as asked or with full checkpointing; None if nothing has room."""
    if not workload.has_rules:
        return None
    options = [option for variant in _variants(workload) for option in _with_room(variant, candidates)]
    if not options:
        return None
    best = min(options, key=lambda option: (option.tier, option.rank))
    return Recommendation(
        optimizer=best.candidate.id,
        implementation=best.candidate.implementation,
        options=best.candidate.options,
        config=best.workload.request.config,
        reasons=_reasons(best, workload, candidates),
        command=command_of(best.workload, best.candidate),
    )


def tier_of(optimizer_id: str) -> int:
    """Position of an optimizer's tier in `TIERS`."""
    return next(index for index, (_, ids) in enumerate(TIERS) if optimizer_id in ids)


def command_of(workload: Workload, candidate: Candidate) -> str:
    """The command line that prints the estimate of one candidate; what is a default anyway is left out."""
    request, config = workload.request, workload.request.config
    flags: list[str] = [
        "optplan",
        "estimate",
        "--model",
        request.model.reference or request.model.name,
        *request.gpu.flags,
    ]
    flags += ["--optimizer", candidate.id, *_setting_flags(candidate)]
    for name, value, default in (
        ("--precision", config.precision, "bf16"),
        ("--batch-size", config.batch_size, 1),
        ("--seq-len", config.seq_len, default_seq_len(request.model)),
        ("--grad-accum", config.grad_accum, 1),
        ("--checkpointing", config.checkpointing, "none"),
        ("--attention", config.attention, default_attention(request.model)),
    ):
        flags += [name, str(value)] if value != default else []
    return shlex.join(flags)


def _setting_flags(candidate: Candidate) -> list[str]:
    flags: list[str] = []
    for key, value in candidate.settings.items():
        flags += ["--set", f"{key}={_text(value)}"]
    return flags


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _variants(workload: Workload) -> list[Workload]:
    request = workload.request
    if request.config.checkpointing != "none":
        return [workload]
    config = msgspec.structs.replace(request.config, checkpointing="full")
    return [workload, Workload(msgspec.structs.replace(request, config=config))]


def _with_room(workload: Workload, candidates: Sequence[Candidate]) -> list[_Option]:
    limit = int(workload.request.gpu.usable_bytes * (1 - ROOM))
    options = []
    for candidate in candidates:
        peaks = workload.peaks(candidate)
        if peaks is None or peaks.peak_bytes > limit:
            continue
        recomputes = int(workload.request.config.checkpointing != "none")
        tier = tier_of(candidate.id)
        rank = (recomputes, TIERS[tier][1].index(candidate.id))
        options.append(_Option(tier, rank, candidate, workload, peaks.peak_bytes))
    return options


def _reasons(best: _Option, asked: Workload, candidates: Sequence[Candidate]) -> list[str]:
    usable, facts = asked.request.gpu.usable_bytes, load_facts()[best.candidate.id]
    reasons = [
        f"peak allocated {format_gib(best.peak_bytes)} of {format_gib(usable)} usable"
        f" leaves {format_gib(usable - best.peak_bytes)} free",
        f"{best.candidate.id}: {TIERS[best.tier][0]}",
        f"evidence: {facts.evidence}",
        f"limits: {facts.limits}",
    ]
    if best.workload is not asked:
        reasons.append(_checkpointing_reason(best, asked))
    largest = best.workload.max_batch_size(best.candidate)
    reasons.append(f"the largest micro-batch that fits is {largest}")
    reasons += _why_others_lost(best, candidates)
    return reasons


def _checkpointing_reason(best: _Option, asked: Workload) -> str:
    peaks = asked.peaks(best.candidate)
    without = format_gib(peaks.peak_bytes) if peaks else "more"
    return f"needs --checkpointing full: without it the peak would be {without}; it recomputes each layer's forward"


def _why_others_lost(best: _Option, candidates: Sequence[Candidate]) -> list[str]:
    workload, reasons = best.workload, []
    for candidate in candidates:
        peaks = workload.peaks(candidate)
        if tier_of(candidate.id) < best.tier and peaks is not None:
            tight = peaks.peak_bytes <= workload.request.gpu.usable_bytes
            verdict = f"which leaves less than {ROOM * 100:.0f} % free" if tight else "which does not fit"
            needed = f"{format_gib(peaks.peak_bytes)} at the peak in {peaks.peak_phase}"
            reasons.append(f"{candidate.id} is better established but needs {needed}, {verdict}")
    return reasons
