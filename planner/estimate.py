"""One configuration in, the estimate out: resident bytes, the peak of each phase, the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import msgspec

from optplan.planner.candidates import Candidate, OptimizerChoice, choose_optimizers
from optplan.planner.catalog import load_model
from optplan.planner.errors import ConfigError
from optplan.planner.flushes import flush_note
from optplan.planner.gpus import gpu_row
from optplan.planner.models.spec import ModelSpec
from optplan.planner.recommend import recommend
from optplan.planner.records import Estimate, EstimateReport, ModelRow, Recommendation, Skipped, TensorRow
from optplan.planner.request import StepFlags, StepRequest, check_request
from optplan.planner.sharding.search_note import fewest_gpus_note
from optplan.planner.step_timer import StepTimer, host_note
from optplan.planner.units import MIB, format_bytes
from optplan.planner.version import VERSION
from optplan.planner.workload import Workload


def estimate(
    model: str | ModelSpec,
    *,
    optimizer: str | Sequence[str] | None = None,
    options: Mapping[str, object] | Sequence[str] | None = None,
    per_tensor: bool = False,
    **step: Unpack[StepFlags],
) -> EstimateReport:
    """How much GPU memory a training step takes, for one optimizer, several or all of them.

    Args:
        model: Catalogue id or alias, path to a `config.json`, or a model already read.
        optimizer: Optimizer id or ids; every one when None.
        options: Options of the optimizers, as a mapping or as `key=value` texts; `micro-adam.window=20` addresses one.
        per_tensor: Whether each estimate lists the state of every parameter.
        step: `gpu` or `memory`, and how the step is run: `batch_size`, `seq_len`, `precision` ... as in `StepFlags`.

    Returns:
        The record that `optplan estimate --json` prints: bytes per GPU, peaks in allocated bytes of a steady step.

    Raises:
        ConfigError: Something in the request is unknown, out of range or contradictory.
    """
    spec = model if isinstance(model, ModelSpec) else load_model(model)
    request = check_request(spec, **step)
    return estimate_request(request, choose_optimizers(optimizer, options), per_tensor=per_tensor)


def estimate_request(
    request: StepRequest,
    choices: Sequence[OptimizerChoice],
    *,
    per_tensor: bool = False,
    workload: Workload | None = None,
    host_launch_seconds: float | None = None,
    advises: bool = True,
) -> EstimateReport:
    """The report for a checked request and the optimizers chosen for it.

    Args:
        request: The step.
        choices: The optimizers.
        per_tensor: Whether each estimate lists the state of every parameter.
        workload: What answers the request; the step rules when None.
        host_launch_seconds: What the host of the step takes to launch one operation, where it was measured.
        advises: Whether other steps are simulated too, for a recommendation and the largest micro-batch.

    Raises:
        ConfigError: An optimizer that was named cannot run this step, the rules are to answer for the trace engine, or
            `host_launch_seconds` is no time.
    """
    if workload is None and request.engine == "trace":
        raise ConfigError("engine trace runs the model itself: call optplan.profilers.estimation.traced_estimate")
    workload = workload or Workload(request)
    candidates, skipped = workload.candidates(choices)
    chosen = {choice.id: choice.optimizer.implementation for choice in choices}
    advice = recommend(workload, candidates) if advises else None
    ordered = candidates if all(choice.explicit for choice in choices) else _recommended_first(candidates, advice)
    gpu, timer = request.gpu, StepTimer(workload, host_launch_seconds=host_launch_seconds)
    tries_changes = advises and len(ordered) == 1
    estimates = [
        _estimate(workload, timer, candidate, chosen[candidate.id], per_tensor=per_tensor, tries_changes=tries_changes)
        for candidate in ordered
    ]
    if advises:
        estimates = [
            msgspec.structs.replace(row, max_batch_size=workload.max_batch_size(candidate))
            for row, candidate in zip(estimates, ordered, strict=True)
        ]
    fewest = fewest_gpus_note(workload, ordered[0]) if [row.fits for row in estimates] == [False] else None
    host = host_note(host_launch_seconds) if any(row.step_seconds for row in estimates) else None
    return EstimateReport(
        version=VERSION,
        engine=request.engine,
        model=ModelRow(request.model.name, request.model.num_parameters, request.model.source),
        gpu=gpu_row(gpu),
        config=request.config,
        estimates=estimates,
        recommendation=advice,
        skipped=[Skipped(name, reason) for name, reason in skipped],
        notes=[*request.notes, *workload.findings(), *(note for note in (fewest, host) if note)],
    )


def _recommended_first(candidates: list[Candidate], advice: Recommendation | None) -> list[Candidate]:
    return sorted(candidates, key=lambda candidate: advice is None or candidate.id != advice.optimizer)


def _estimate(
    workload: Workload, timer: StepTimer, candidate: Candidate, chosen: str, *, per_tensor: bool, tries_changes: bool
) -> Estimate:
    row: dict[str, Any] = {"per_tensor": _tensor_rows(candidate)} if per_tensor else {}
    row |= _peak_fields(workload, candidate)
    seconds = timer.seconds(candidate)
    flushes = flush_note(workload, candidate, tries_changes=tries_changes)
    return Estimate(
        optimizer=candidate.id,
        implementation=candidate.implementation,
        options=candidate.options,
        bytes=workload.resident(candidate),
        state_tensors=dict(candidate.footprint.bytes_by_name),
        fits=workload.fits(candidate),
        step_seconds=seconds.as_dict() if seconds else None,
        state_variants=workload.state_variants(candidate),
        saving_against_adamw=workload.saving(candidate),
        notes=[*_notes(candidate, chosen), *workload.notes(candidate), *([flushes] if flushes else [])],
        **row,
    )


def _peak_fields(workload: Workload, candidate: Candidate) -> dict[str, Any]:
    peaks = workload.peaks(candidate)
    if peaks is None:
        return {}
    return {
        "phases": peaks.phases,
        "peak_allocated_bytes": peaks.peak_bytes,
        "peak_phase": peaks.peak_phase,
        "peak_categories": peaks.categories,
        "peak_reserved_bytes": peaks.reserved_bytes,
        "peak_reserved_range_bytes": peaks.reserved_range_bytes,
        "device_bytes": peaks.reserved_bytes + workload.request.gpu.outside_bytes,
        "headroom_bytes": workload.usable_bytes - peaks.peak_bytes,
    }


def _notes(candidate: Candidate, chosen: str) -> list[str]:
    notes = []
    if candidate.implementation != chosen:
        notes.append(f"implementation={candidate.implementation}, because {chosen} cannot run this step")
    if candidate.footprint.host_bytes >= MIB:
        host = format_bytes(candidate.footprint.host_bytes)
        notes.append(f"{host} of its state live on the host or can be evicted to it, and are not counted on the device")
    return notes


def _tensor_rows(candidate: Candidate) -> list[TensorRow]:
    return [
        TensorRow(parameter.name, tensor.name, tensor.shape, tensor.dtype, tensor.device, tensor.num_bytes)
        for group in candidate.footprint.groups
        for parameter in group.parameters
        for tensor in group.tensors
    ] + [
        TensorRow("", tensor.name, tensor.shape, tensor.dtype, tensor.device, tensor.num_bytes)
        for tensor in candidate.footprint.shared
    ]
