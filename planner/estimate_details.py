"""What a page shows beyond an estimate: one configuration's step, its state by tensor, its sources, its neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from optplan.planner.candidates import Candidate, OptimizerChoice, bind_candidate, choose_optimizers
from optplan.planner.catalog import load_model
from optplan.planner.errors import ConfigError
from optplan.planner.estimate import estimate_request
from optplan.planner.explain import explain_workload
from optplan.planner.explanation import ExplainedPart
from optplan.planner.models.spec import ModelSpec
from optplan.planner.optimizers.base import OptimizerModel
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.records import Estimate, EstimateReport, StepConfig
from optplan.planner.replay import LiveTensor
from optplan.planner.request import StepRequest, check_request
from optplan.planner.step_history import PhaseSpan
from optplan.planner.timeline_report import CurvePoint, curve, largest
from optplan.planner.version import VERSION
from optplan.planner.what_if import WORK, WhatIf, what_if
from optplan.planner.workload import StepPeaks, Workload

_USUAL_OPTIMIZERS = ("adamw", "adam-mini", "micro-adam", "adamw-8bit", "adafactor", "lion")


class StateRow(msgspec.Struct, frozen=True, kw_only=True):
    """State tensors that differ only in the layer they belong to.

    Attributes:
        parameter: Name of the parameters with `*` for the layer number, empty for what is kept once.
        state: Name of the state.
        shape: Shape of one.
        dtype: Its dtype.
        device: Where it lives.
        count: How many there are.
        bytes_each: Bytes of one.
        bytes: Bytes of all.
    """

    parameter: str
    state: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    count: int
    bytes_each: int
    bytes: int


class StepCurve(msgspec.Struct, frozen=True, kw_only=True):
    """A steady step moment by moment, as in the record of `optplan timeline`."""

    num_events: int
    peak_event: int
    phases: list[PhaseSpan]
    points: list[CurvePoint]
    alive: list[LiveTensor]


class EstimateDetails(msgspec.Struct, frozen=True, kw_only=True):
    """One configuration of an estimate in detail.

    Attributes:
        config: How its step is run; the recommendation's where there is one.
        estimate: Its row.
        curve: Its step, None without step rules.
        state: Its state, largest first.
        parts: Where each of its numbers comes from; empty where nothing but the rules could tell.
        what_if: Answers around it, None without step rules.
    """

    config: StepConfig
    estimate: Estimate
    curve: StepCurve | None
    state: list[StateRow]
    parts: list[ExplainedPart]
    what_if: WhatIf | None


def details_of(report: EstimateReport, *, model: str | ModelSpec | None = None) -> EstimateDetails | None:
    """The recommended configuration in detail, or the one with the smallest peak where nothing is recommended.

    Args:
        report: The estimate.
        model: What it was made of; its name is looked up in the catalogue when None.

    Returns:
        None where the estimate cannot be made again: it holds no optimizer, was traced, or its model is not at hand.
    """
    if not report.estimates or report.engine != "rules":
        return None
    try:
        spec = model if isinstance(model, ModelSpec) else load_model(model or report.model.name)
        if spec.num_parameters != report.model.num_parameters:
            return None
        return _details(report, spec)
    except ConfigError:
        return None


def estimate_in_detail(
    model: str | ModelSpec,
    *,
    optimizer: str,
    options: Mapping[str, object],
    work: int = WORK,
    **step: Any,
) -> tuple[EstimateReport, EstimateDetails]:
    """The estimate of one configuration and its details, each part of it simulated once.

    Args:
        model: As `estimate` takes it; likewise `optimizer`, `options` and `step`.
        optimizer: Its id.
        options: Its options.
        work: What the grid of answers around it may simulate, in events.
        step: How the step is run.

    Raises:
        ConfigError: Something in the request is unknown, out of range or contradictory.
    """
    spec = model if isinstance(model, ModelSpec) else load_model(model)
    workload = Workload(check_request(spec, **step))
    report = estimate_request(workload.request, choose_optimizers([optimizer], options), workload=workload)
    return report, _details(report, spec, answered=workload, work=work)


def focus_of(report: EstimateReport) -> tuple[Estimate, StepConfig]:
    """The row and the step that a report is about first; the row is of the step as asked."""
    advice = report.recommendation
    if advice is not None:
        for row in report.estimates:
            if (row.optimizer, row.implementation) == (advice.optimizer, advice.implementation):
                return row, advice.config
    rows = [row for row in report.estimates if row.peak_allocated_bytes is not None] or report.estimates
    return min(rows, key=lambda row: row.peak_allocated_bytes or row.bytes.total), report.config


def _details(
    report: EstimateReport, spec: ModelSpec, *, answered: Workload | None = None, work: int = WORK
) -> EstimateDetails:
    row, config = focus_of(report)
    request = _request(report, spec, config)
    choice = _choice(row)
    answered = answered or _answered(report, spec)
    workload = answered if answered.request.config == config else answered.at(request)
    candidate = bind_candidate(request, choice.optimizer)
    estimate = row
    if config != report.config or report.version != VERSION:
        (estimate,) = estimate_request(request, [choice], workload=workload).estimates
    return EstimateDetails(
        config=config,
        estimate=estimate,
        curve=_curve(workload, candidate),
        state=_state(candidate),
        parts=explain_workload(workload, [choice]).parts,
        what_if=what_if(
            request, _optimizers(report, choice), work=_work_left(work, report, workload), known=[workload, answered]
        ),
    )


def _work_left(work: int, report: EstimateReport, workload: Workload) -> int:
    """What the grid may simulate: less where the report itself has taken long."""
    spent = len(report.estimates) * workload.num_events * 3 // 5 if workload.has_rules else 0
    return max(work // 10, work - spent)


def _answered(report: EstimateReport, spec: ModelSpec) -> Workload:
    """The step as asked, with the peaks that the report holds; those of another version are found anew."""
    workload = Workload(_request(report, spec, report.config))
    for row in report.estimates:
        if report.version == VERSION and row.phases and row.peak_phase and row.peak_reserved_bytes is not None:
            peaks = StepPeaks(row.phases, row.peak_phase, row.peak_categories or {}, row.peak_reserved_bytes)
            workload.remember(_choice(row).optimizer, peaks)
    return workload


def _request(report: EstimateReport, spec: ModelSpec, config: StepConfig) -> StepRequest:
    return check_request(spec, **_flags(report, config))


def _flags(report: EstimateReport, config: StepConfig) -> dict[str, Any]:
    settings: dict[str, Any] = {name: getattr(config, name) for name in StepConfig.__struct_fields__}
    # A budget has no context and is named by its size.
    target = {"memory": report.gpu.total_bytes} if report.gpu.context_bytes == 0 else {"gpu": report.gpu.name}
    return settings | target


def _choice(row: Estimate) -> OptimizerChoice:
    (choice,) = choose_optimizers([row.optimizer], _options(row))
    return choice


def _options(row: Estimate) -> Mapping[str, object]:
    return {"implementation": row.implementation, **row.options}


def _optimizers(report: EstimateReport, first: OptimizerChoice) -> list[OptimizerModel]:
    """What a page may switch to: the first, then the well-known ones, as the report has them or with their defaults."""
    rows = {row.optimizer: row for row in report.estimates}
    names = [name for name in dict.fromkeys((*_USUAL_OPTIMIZERS, *rows)) if name != first.id]
    return [
        first.optimizer,
        *(_choice(rows[name]).optimizer if name in rows else build_optimizer(name) for name in names),
    ]


def _curve(workload: Workload, candidate: Candidate) -> StepCurve | None:
    history = workload.history(candidate)
    if history is None:
        return None
    return StepCurve(
        num_events=len(history.events),
        peak_event=history.peak_event,
        phases=history.spans(),
        points=curve(history),
        alive=largest(history.alive(history.peak_event)),
    )


def _state(candidate: Candidate) -> list[StateRow]:
    groups = [(group.pattern, len(group.parameters), group.tensors) for group in candidate.footprint.groups]
    rows = [
        StateRow(
            parameter=pattern,
            state=tensor.name,
            shape=tensor.shape,
            dtype=tensor.dtype,
            device=tensor.device,
            count=count,
            bytes_each=tensor.num_bytes,
            bytes=count * tensor.num_bytes,
        )
        for pattern, count, tensors in [*groups, ("", 1, candidate.footprint.shared)]
        for tensor in tensors
    ]
    return sorted(rows, key=lambda row: -row.bytes)
