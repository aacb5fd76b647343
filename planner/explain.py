"""One configuration taken apart: every number of its estimate with the formula filled in and the source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Unpack

from optplan.planner.candidates import Candidate, OptimizerChoice, choose_optimizers, optimizer_context
from optplan.planner.catalog import load_model
from optplan.planner.dtypes import ITEMSIZE_BYTES
from optplan.planner.errors import ConfigError
from optplan.planner.explanation import ExplainedLine, ExplainedPart, Explanation, explained_line
from optplan.planner.footprint import group_parameters, pattern_of
from optplan.planner.gpus import gpu_row
from optplan.planner.models.spec import ModelSpec
from optplan.planner.optimizers.facts import load_facts
from optplan.planner.records import ModelRow
from optplan.planner.request import StepFlags, StepRequest, check_request
from optplan.planner.requested_step import num_in_flight, resident_bytes, sharded_view, step_options
from optplan.planner.sharding.rank import updated_parameters
from optplan.planner.sharding.report import rank_notes
from optplan.planner.step.alive import alive_at_peak
from optplan.planner.step.rules import step_memory
from optplan.planner.tensors import StateTensor
from optplan.planner.units import format_gib
from optplan.planner.version import VERSION
from optplan.planner.workload import StepPeaks, Workload


def explain(
    model: str | ModelSpec,
    *,
    optimizer: str = "adamw",
    options: Mapping[str, object] | Sequence[str] | None = None,
    **step: Unpack[StepFlags],
) -> Explanation:
    """The parts of one estimate: what they are, how large, why, and where the rule comes from.

    Args:
        model: Catalogue id or alias, path to a `config.json`, or a model already read.
        optimizer: One optimizer id.
        options: Its options, as a mapping or as `key=value` texts.
        step: `gpu` or `memory`, and how the step is run, as in `StepFlags`.

    Raises:
        ConfigError: Something in the request is unknown, out of range or contradictory.
    """
    if not isinstance(optimizer, str):
        raise ConfigError(f"one optimizer is explained at a time, got {len(optimizer)}")
    spec = model if isinstance(model, ModelSpec) else load_model(model)
    request = check_request(spec, **step)
    if request.engine != "rules":
        raise ConfigError(f"formulas explain the rules, not engine {request.engine}; use --engine rules")
    return explain_workload(Workload(request), choose_optimizers(optimizer, options))


def explain_workload(workload: Workload, choices: Sequence[OptimizerChoice]) -> Explanation:
    """The same of a workload, which remembers what it has simulated, and one optimizer."""
    request = workload.request
    spec, gpu = request.model, request.gpu
    (candidate,), _ = workload.candidates(choices)
    peaks = workload.peaks(candidate)
    return Explanation(
        version=VERSION,
        engine=request.engine,
        model=ModelRow(spec.name, spec.num_parameters, spec.source),
        gpu=gpu_row(gpu),
        config=request.config,
        optimizer=candidate.id,
        implementation=candidate.implementation,
        options=candidate.options,
        parts=_parts(workload, candidate, peaks),
        peak_allocated_bytes=None if peaks is None else peaks.peak_bytes,
        peak_phase=None if peaks is None else peaks.peak_phase,
        fits=workload.fits(candidate),
        notes=[*request.notes, *rank_notes(request)],
    )


def _parts(workload: Workload, candidate: Candidate, peaks: StepPeaks | None) -> list[ExplainedPart]:
    request = workload.request
    parts = [_parameters(request), *_buffers(request), _gradients(request), *_master_weights(request)]
    parts += [*_state(candidate), *_temporaries(workload, candidate), _moved(workload, candidate)]
    if peaks is not None:
        parts += [_peak(workload, candidate, peaks), _phases(peaks)]
    parts.append(_gpu(request))
    if peaks is not None:
        parts.append(_verdict(workload, candidate, peaks))
    return parts


def _parameters(request: StepRequest) -> ExplainedPart:
    dtype = request.policy.parameter_dtype
    return _part(
        "parameters",
        f"Parameters in {dtype}",
        _parameter_lines(request, dtype),
        f"inventory of {request.model.architecture}; configuration: {request.model.source}",
        f"{request.model.num_parameters:,} elements; tied parameters count once.",
    )


def _parameter_lines(request: StepRequest, dtype: str) -> list[ExplainedLine]:
    size, model = ITEMSIZE_BYTES[dtype], request.rank_model
    if request.strategy is not None:
        return _lines_alike(request.strategy.parameters(sharded_view(request)), "as this rank stores it")
    return [
        explained_line(pattern, members[0].numel * size, f"{_sizes(members[0].shape)} x {size} B", count=len(members))
        for pattern, members in group_parameters(model.unique_parameters)
    ]


def _lines_alike(sized: Iterable[tuple[str, int]], formula: str) -> list[ExplainedLine]:
    """One line for all that differ only in the layer."""
    counts = Counter((pattern_of(name), num_bytes) for name, num_bytes in sized)
    return [explained_line(name, num_bytes, formula, count=count) for (name, num_bytes), count in counts.items()]


def _sizes(shape: Iterable[int]) -> str:
    return " x ".join(f"{size}" for size in shape) or "1"


def _buffers(request: StepRequest) -> list[ExplainedPart]:
    lines = []
    for buffer in request.rank_model.buffers:
        size = ITEMSIZE_BYTES[buffer.dtype or request.policy.parameter_dtype]
        lines.append(explained_line(buffer.name, buffer.numel * size, f"{_sizes(buffer.shape)} x {size} B"))
    source = f"inventory of {request.model.architecture}"
    return [_part("parameters", "Buffers, counted with the parameters at the peak", lines, source)] if lines else []


def _gradients(request: StepRequest) -> ExplainedPart:
    dtype, size = request.policy.gradient_dtype, ITEMSIZE_BYTES[request.policy.gradient_dtype]
    count = sum(parameter.numel for parameter in request.rank_model.trained_parameters)
    lines = [explained_line("one for each parameter", count * size, f"{count} x {size} B")]
    if request.strategy is not None:
        view = sharded_view(request)
        kept = [(name, size) for name, size, category in request.strategy.kept(view) if category == "gradients"]
        lines = _lines_alike([*kept, *request.strategy.gradients(view)], "as this rank keeps them")
    return _part(
        "gradients",
        f"Gradients in {dtype}",
        lines,
        f"precision {request.config.precision}: {request.policy.summary}",
        "They live from their backward to the end of the step.",
    )


def _master_weights(request: StepRequest) -> list[ExplainedPart]:
    dtype, updated = request.policy.master_dtype, request.rank_model.unique_parameters
    count = sum(parameter.numel for parameter in updated_parameters(updated, request.strategy))
    if dtype is None:
        return []
    size = ITEMSIZE_BYTES[dtype]
    line = explained_line("one for each parameter", count * size, f"{count} x {size} B")
    source = f"precision {request.config.precision}: {request.policy.summary}"
    return [_part("master_weights", f"Master weights in {dtype}", [line], source)]


def _state(candidate: Candidate) -> list[ExplainedPart]:
    """One part a state name, in the order in which the optimizer creates them."""
    source = load_facts()[candidate.id].source
    lines: dict[str, list[ExplainedLine]] = {}
    for group in candidate.footprint.groups:
        for tensor in group.tensors:
            line = explained_line(group.pattern, tensor.num_bytes, tensor.formula, count=len(group.parameters))
            lines.setdefault(_heading(tensor), []).append(line)
    for tensor in candidate.footprint.shared:
        line = explained_line("once per optimizer", tensor.num_bytes, tensor.formula)
        lines.setdefault(_heading(tensor), []).append(line)
    return [_part("optimizer_state", heading, part, source) for heading, part in lines.items()]


def _heading(tensor: StateTensor) -> str:
    places = {"device": "", "cpu": ", on the host and not counted", "managed": ", evictable and not counted"}
    return f"Optimizer state {tensor.name} in {tensor.dtype}{places[tensor.device]}"


def _temporaries(workload: Workload, candidate: Candidate) -> list[ExplainedPart]:
    total = workload.temporary_bytes(candidate)
    if not total:
        return []
    line = explained_line("alive together at the peak of step()", total, "replay of its allocations")
    title = "What step() allocates besides, counted in the phase step"
    return [_part("optimizer_temporaries", title, [line], load_facts()[candidate.id].source)]


def _moved(workload: Workload, candidate: Candidate) -> ExplainedPart:
    request, moved = workload.request, workload.moved_bytes(candidate)
    each = moved / request.rank_model.num_parameters
    line = explained_line(
        "parameters, gradients and state", moved, f"{each:.2f} B for each of the parameters on average"
    )
    title = "Memory traffic that step() cannot avoid; nothing is held"
    source = "each tensor read once, and written once where it changes"
    return _part("moved", title, [line], source, _fastest(request, moved))


def _fastest(request: StepRequest, moved_bytes: int) -> str:
    bandwidth = request.gpu.achievable_bandwidth_bytes_per_s
    if bandwidth is None:
        return ""
    milliseconds = moved_bytes / bandwidth * 1000
    return f"At best {milliseconds:.2f} ms, at the copy bandwidth of {bandwidth / 1e9:,.0f} GB/s."


def _peak(workload: Workload, candidate: Candidate, peaks: StepPeaks) -> ExplainedPart:
    request = workload.request
    lines = alive_at_peak(
        request.rank_model,
        step_options(request),
        peaks.peak_phase,
        optimizer=candidate.optimizer,
        context=optimizer_context(request),
        master=request.policy.master_dtype,
        strategy=request.strategy,
    )
    lines += [*_resident_lines(request, candidate), *_waiting_lines(request, peaks)]
    beyond = peaks.peak_bytes - sum(line.bytes for line in lines)
    formula = "what the caching allocator's blocks hold beyond the requests, from the simulation"
    lines.append(explained_line("blocks handed out whole", beyond, formula))
    return _part(
        "peak",
        f"Alive at the peak, in {peaks.peak_phase}",
        lines,
        "rules of the model's step, written from recorded allocation histories; see docs/memory-model.md",
        "Allocated bytes: every request is rounded up to 512 B, and a block keeps a rest of up to 1 MiB.",
    )


def _resident_lines(request: StepRequest, candidate: Candidate) -> list[ExplainedLine]:
    resident = {**resident_bytes(request), "optimizer_state": candidate.footprint.rounded_device_bytes}
    return [
        explained_line(f"{name} (resident)", size, "each tensor rounded up to 512 B")
        for name, size in resident.items()
        if size
    ]


def _waiting_lines(request: StepRequest, peaks: StepPeaks) -> list[ExplainedLine]:
    """What other micro-batches of a pipeline have saved."""
    waiting = num_in_flight(request) - 1
    if not waiting or peaks.peak_phase not in ("forward", "backward"):
        return []
    saved = step_memory(request.rank_model, step_options(request), request.strategy).saved
    return [explained_line("saved by a waiting micro-batch", saved, request.config.pipeline_schedule, count=waiting)]


def _phases(peaks: StepPeaks) -> ExplainedPart:
    lines = [
        explained_line(phase, peak.peak_allocated_bytes, "largest allocated bytes")
        for phase, peak in peaks.phases.items()
    ]
    return ExplainedPart(
        "phases", "Peaks by phase of a steady step", peaks.peak_bytes, "replay of the step timeline", lines
    )


def _gpu(request: StepRequest) -> ExplainedPart:
    gpu = request.gpu
    lines = [
        explained_line("total", gpu.total_bytes, f"{gpu.total_basis}: {gpu.total_source}"),
        explained_line("context and kernels", gpu.context_bytes, f"{gpu.context_basis}: {gpu.context_source}"),
    ]
    source = gpu.source or "the budget given with --memory"
    if gpu.communication_bytes:
        formula = f"NCCL, {gpu.communication_basis}: two H200s take 847 MiB for one group of ranks"
        lines.append(explained_line("communication library", gpu.communication_bytes, formula))
    return ExplainedPart("gpu", f"Usable memory of {gpu.id}: total less context", gpu.usable_bytes, source, lines)


def _verdict(workload: Workload, candidate: Candidate, peaks: StepPeaks) -> ExplainedPart:
    request, shortage = workload.request, workload.shortage(candidate)
    headroom = request.gpu.usable_bytes - peaks.peak_bytes
    word = "fits" if workload.fits(candidate) else "does not fit"
    formula = f"{request.gpu.usable_bytes:,} B usable - {peaks.peak_bytes:,} B peak"
    return ExplainedPart(
        "verdict",
        f"Headroom: the step {word}",
        headroom,
        "usable memory less the peak",
        [explained_line("headroom", headroom, formula)],
        f"{format_gib(peaks.peak_bytes)} of {format_gib(request.gpu.usable_bytes)} per GPU"
        + (f"; it {shortage}." if shortage else "."),
    )


def _part(
    key: str, title: str, lines: list[ExplainedLine], source: str, remark: str = "", *, total: int | None = None
) -> ExplainedPart:
    ordered = sorted(lines, key=lambda line: -line.bytes)
    return ExplainedPart(
        key, title, sum(line.bytes for line in lines) if total is None else total, source, ordered, remark
    )
