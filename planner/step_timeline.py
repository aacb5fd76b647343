"""One steady step moment by moment: what `optplan timeline` answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Unpack

from optplan.planner.candidates import Candidate, choose_optimizers
from optplan.planner.catalog import load_model
from optplan.planner.errors import ConfigError
from optplan.planner.flushes import flush_note
from optplan.planner.gpus import gpu_row
from optplan.planner.models.spec import ModelSpec
from optplan.planner.peak_changes import peak_changes
from optplan.planner.records import ModelRow
from optplan.planner.request import StepFlags, check_request
from optplan.planner.step_history import StepHistory
from optplan.planner.timeline_report import TimelineReport, categories_of, curve, largest
from optplan.planner.version import VERSION
from optplan.planner.workload import Workload


def timeline(
    model: str | ModelSpec,
    *,
    optimizer: str = "adamw",
    options: Mapping[str, object] | Sequence[str] | None = None,
    **step: Unpack[StepFlags],
) -> TimelineReport:
    """Memory over a steady step, what is alive at its peak, and what would lower it; by the rules.

    Args:
        model: Catalogue id or alias, path to a `config.json`, or a model already read.
        optimizer: One optimizer id.
        options: Its options, as a mapping or as `key=value` texts.
        step: `gpu` or `memory`, and how the step is run, as in `StepFlags`.

    Raises:
        ConfigError: Something in the request is unknown, out of range or contradictory, or the family has no rules.
    """
    spec = model if isinstance(model, ModelSpec) else load_model(model)
    workload = Workload(check_request(spec, **step))
    return timeline_of(workload, optimizer, options)


def timeline_of(
    workload: Workload, optimizer: str, options: Mapping[str, object] | Sequence[str] | None = None
) -> TimelineReport:
    """The timeline of a workload's step with one optimizer, by whichever engine the workload answers.

    Raises:
        ConfigError: The optimizer cannot run the step, or the family has no rules.
    """
    (candidate,), _ = workload.candidates(choose_optimizers(optimizer, options))
    history = workload.history(candidate)
    if history is None:
        family = workload.request.model.model_type
        raise ConfigError(f"{family} models have no step rules in this version: no timeline; try --engine trace")
    return _report(workload, candidate, history)


def _report(workload: Workload, candidate: Candidate, history: StepHistory) -> TimelineReport:
    request, gpu, model = workload.request, workload.request.gpu, workload.request.model
    peak_event, peak_bytes = history.peak_event, max(history.allocated)
    alive = history.alive(peak_event)
    peaks = workload.peaks(candidate)
    assert peaks is not None
    verdict = workload.shortage(candidate) or flush_note(workload, candidate, tries_changes=True)
    return TimelineReport(
        version=VERSION,
        engine=request.engine,
        model=ModelRow(model.name, model.num_parameters, model.source),
        gpu=gpu_row(gpu),
        config=request.config,
        optimizer=candidate.id,
        implementation=candidate.implementation,
        options=candidate.options,
        num_events=len(history.events),
        phases=history.spans(),
        peak_allocated_bytes=peak_bytes,
        peak_phase=peaks.peak_phase,
        peak_event=peak_event,
        peak_reserved_bytes=history.reserved_bytes,
        peak_categories=categories_of(alive),
        alive=largest(alive),
        alive_count=len(alive),
        curve=curve(history),
        changes=peak_changes(workload, candidate, peak_bytes=peak_bytes),
        fits=workload.fits(candidate) is True,
        headroom_bytes=workload.usable_bytes - peaks.peak_bytes,
        notes=[*([f"the step {verdict}"] if verdict else []), *request.notes, *workload.findings()],
    )
