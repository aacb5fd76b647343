"""The optimizer to take for a step that is given, and the reasons; `optplan recommend` searches the step as well.

The order is that of the search: by what is known of each optimizer (`data/evidence.toml`), then by time, as asked or
with full checkpointing. A step has room when all that the allocator would reserve for it on an empty GPU, cached blocks
included, leaves 2 % of the usable bytes free: predicted reserved memory is at most 2 % off in measured steps.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from optplan.planner.candidates import Candidate
from optplan.planner.dtypes import SHORT_NAMES, Dtype
from optplan.planner.optimizers.facts import load_facts
from optplan.planner.records import Recommendation
from optplan.planner.request import default_attention, default_seq_len
from optplan.planner.requested_step import step_options
from optplan.planner.search.evidence import EvidenceKey, class_of, evidence_key
from optplan.planner.search.picks import Ranked, in_order
from optplan.planner.sharding.clusters import usual_num_nodes
from optplan.planner.step.rules import describes
from optplan.planner.step_timer import StepTimer
from optplan.planner.units import format_gib
from optplan.planner.workload import Workload

ROOM = 0.02
"""Share of the usable bytes that a recommended step does not even reserve."""


class _Option(NamedTuple):
    key: EvidenceKey
    candidate: Candidate
    workload: Workload


def recommend(workload: Workload, candidates: Sequence[Candidate]) -> Recommendation | None:
    """The configuration to run among the candidates, as asked or with full checkpointing; None if nothing has room."""
    if not workload.has_rules:
        return None
    entries = [entry for variant in _variants(workload) for entry in _entries(variant, candidates)]
    ordered = in_order(entries, "quality")
    best = next((option for option in ordered if _has_room(option.workload, option.candidate)), None)
    if best is None:
        return None
    return Recommendation(
        optimizer=best.candidate.id,
        implementation=best.candidate.implementation,
        options=best.candidate.options,
        config=best.workload.request.config,
        reasons=_reasons(best, workload, candidates),
        command=command_of(best.workload, best.candidate),
    )


def _entries(workload: Workload, candidates: Sequence[Candidate]) -> list[tuple[Ranked, _Option]]:
    timer, recomputes = StepTimer(workload), workload.request.config.checkpointing != "none"
    entries = []
    for candidate in candidates:
        key, seconds = _evidence_of(workload, candidate), timer.seconds(candidate)
        # The peak would settle ties alone, and costs a trace under that engine.
        ranked = Ranked(key, seconds.step if seconds else 1.0 + recomputes / 3, 0, int(recomputes))
        entries.append((ranked, _Option(key, candidate, workload)))
    return entries


def _evidence_of(workload: Workload, candidate: Candidate) -> EvidenceKey:
    request = workload.request
    return evidence_key(
        candidate.optimizer,
        request.config.precision,
        state_dtype=request.state_dtype,
        step_in_backward=request.config.step_in_backward,
    )


def _has_room(workload: Workload, candidate: Candidate) -> bool:
    limit = workload.request.gpu.usable_bytes * (1 - ROOM)
    if workload.rounded_peak_bytes(candidate) > limit:
        return False
    peaks = workload.peaks(candidate)
    return peaks is not None and peaks.most_reserved_bytes <= limit and workload.fits(candidate) is True


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
        ("--state-dtype", _short(request.state_dtype), None),
        ("--batch-size", config.batch_size, 1),
        ("--seq-len", config.seq_len, default_seq_len(request.model)),
        ("--grad-accum", config.grad_accum, 1),
        ("--checkpointing", config.checkpointing, "none"),
        ("--attention", config.attention, default_attention(request.model)),
        ("--engine", request.engine, "rules"),
        ("--fused-loss", config.fused_loss, "none"),
        ("--clip-grad-norm", config.clip_grad_norm, None),
        ("--gpus", config.gpus, 1),
        ("--nodes", config.nodes, usual_num_nodes(config.gpus, request.gpu.id)),
        ("--sharding", config.sharding, "none"),
        ("--tensor-parallel", config.tensor_parallel, 1),
        ("--pipeline-parallel", config.pipeline_parallel, 1),
        ("--pipeline-schedule", config.pipeline_schedule, "1f1b"),
        ("--alloc-conf", config.alloc_conf, ""),
    ):
        flags += [name, str(value)] if value != default else []
    switches = ("step_in_backward", "keep_grads", "padding_mask", "empty_cache", "sequence_parallel")
    flags += ["--" + name.replace("_", "-") for name in switches if getattr(config, name)]
    return shlex.join(flags)


def _short(dtype: Dtype | None) -> str | None:
    """A dtype as `--state-dtype` takes it."""
    return next((short for short, name in SHORT_NAMES.items() if name == dtype), None)


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
    recomputing = msgspec.structs.replace(request, config=config)
    if request.engine == "rules" and not describes(request.model, step_options(recomputing)):
        return [workload]
    return [workload, workload.at(recomputing)]


def _reasons(best: _Option, asked: Workload, candidates: Sequence[Candidate]) -> list[str]:
    usable, facts = asked.request.gpu.usable_bytes, load_facts()[best.candidate.id]
    peaks = best.workload.peaks(best.candidate)
    assert peaks is not None
    reasons = [
        f"peak allocated {format_gib(peaks.peak_bytes)}, reserved {format_gib(peaks.reserved_bytes)},"
        f" of {format_gib(usable)} usable{' on each GPU' if asked.request.config.gpus > 1 else ''}",
        f"{best.candidate.id}: {class_of(best.candidate.id).reason}",
        f"evidence: {facts.evidence}",
        f"limits: {facts.limits}",
    ]
    if best.workload is not asked:
        reasons.append(_checkpointing_reason(best, asked))
    reasons.append(f"the largest micro-batch that fits is {best.workload.max_batch_size(best.candidate)}")
    return reasons + _why_others_lost(best, candidates)


def _checkpointing_reason(best: _Option, asked: Workload) -> str:
    peaks = asked.peaks(best.candidate)
    without = format_gib(peaks.peak_bytes) if peaks else "more"
    return f"needs --checkpointing full: without it the peak would be {without}; it recomputes each layer's forward"


def _why_others_lost(best: _Option, candidates: Sequence[Candidate]) -> list[str]:
    return [
        f"{candidate.id} is better established but {_shortage(best.workload, candidate)}"
        for candidate in candidates
        if _evidence_of(best.workload, candidate) < best.key and not _has_room(best.workload, candidate)
    ]


def _shortage(workload: Workload, candidate: Candidate) -> str:
    peaks = workload.peaks(candidate)
    assert peaks is not None
    needed = f"needs {format_gib(peaks.peak_bytes)} at the peak in {peaks.peak_phase}"
    if peaks.peak_bytes > workload.request.gpu.usable_bytes:
        return f"{needed}, which does not fit"
    return f"{needed} and reserves {format_gib(peaks.reserved_bytes)}, which leaves no room"
