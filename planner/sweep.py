"""Exact estimates for every combination of models, GPUs, optimizers and sizes, in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from math import prod
from typing import Any

from optplan.planner.candidates import (
    Candidate,
    OptimizerChoice,
    bind_candidate,
    bind_runnable,
    choose_optimizers,
    settings_of,
)
from optplan.planner.catalog import load_model
from optplan.planner.errors import ConfigError
from optplan.planner.gpus import Gpu
from optplan.planner.models.spec import ModelSpec
from optplan.planner.request import StepRequest, default_attention, default_seq_len
from optplan.planner.step_timer import StepTimer
from optplan.planner.sweep_axes import AXES, check_size, check_values, layouts_of, request_at, shown, targets_of, unique
from optplan.planner.sweep_records import SweepReport, SweepRow
from optplan.planner.version import VERSION
from optplan.planner.workload import StepPeaks, Workload


def sweep(
    models: Sequence[str],
    *,
    gpus: Sequence[str] = (),
    optimizers: Sequence[str] | None = None,
    options: Mapping[str, object] | Sequence[str] | None = None,
    precisions: Sequence[str] = ("bf16",),
    seq_lens: Sequence[int] | None = None,
    batch_sizes: Sequence[int] = (1,),
    checkpointings: Sequence[str] = ("none",),
    gpus_per_run: Sequence[int] = (1,),
    shardings: Sequence[str] = ("none",),
    budget: str | int | None = None,
    progress: Callable[[str], None] = lambda _: None,
    **step: Any,
) -> SweepReport:
    """The grid of estimates.

    Args:
        models: Catalogue names or paths of a `config.json`.
        gpus: Names of the GPU catalogue; the budget alone when empty.
        optimizers: Optimizer ids; every one when None.
        options: Options of the optimizers, as in `optplan.estimate`.
        precisions: Values of `--precision`.
        seq_lens: Tokens of a sequence; each model's default when None.
        batch_sizes: Sequences of a micro-batch.
        checkpointings: Values of `--checkpointing`.
        gpus_per_run: Numbers of GPUs that work together.
        shardings: How several of them divide the work; each number of several GPUs is tried under each.
        budget: Bytes that a step may allocate, as a number or as text such as `38GiB`.
        progress: Told what is being computed.
        step: The rest of the step, the same for every row, as in `StepFlags`.

    Raises:
        ConfigError: A name is unknown, a value out of range, the grid is too large, or there is neither GPU nor budget.
    """
    choices = choose_optimizers(optimizers, options)
    targets, limit = targets_of(gpus, budget)
    specs = [load_model(name) for name in unique("models", models)]
    axes: dict[str, list[Any]] = {
        "model": specs,
        "gpu": targets,
        "layout": layouts_of(unique("gpus-per-run", gpus_per_run), unique("sharding", shardings)),
        "precision": unique("precisions", precisions),
        "seq_len": unique("seq-lens", seq_lens if seq_lens is not None else (None,)),
        "batch_size": unique("batch-sizes", batch_sizes),
        "checkpointing": unique("checkpointing", checkpointings),
        "optimizer": choices,
    }
    check_size(axes)
    check_values(axes, step)
    rows = list(_Grid(axes, step, limit, progress).rows())
    return SweepReport(version=VERSION, budget_bytes=limit, axes=shown(axes), rows=rows)


class _Grid:
    """The rows, computed by steps: GPUs that run the same kernels share one."""

    def __init__(
        self, axes: dict[str, list[Any]], step: dict[str, Any], limit: int | None, progress: Callable[[str], None]
    ) -> None:
        self._axes, self._step, self._limit, self._progress = axes, step, limit, progress
        self._workloads: dict[tuple[Any, ...], Workload] = {}
        self._timers: dict[int, StepTimer] = {}
        self._candidates: dict[tuple[int, str], Candidate | ConfigError] = {}
        self._model: str | None = None

    def rows(self) -> Iterator[SweepRow]:
        """Every combination in the order of the axes."""
        total = prod(len(values) for values in self._axes.values())
        for done, values in enumerate(product(*(self._axes[name] for name in AXES))):
            point = dict(zip(AXES, values, strict=True))
            self._forget_other_models(point["model"])
            self._progress(f"{done} of {total}: {point['model'].name}, {point['optimizer'].id}")
            yield self._row(point)

    def _forget_other_models(self, model: ModelSpec) -> None:
        """The model is the slowest axis: what was computed for another is never asked for again."""
        if self._model != model.name:
            self._workloads.clear()
            self._timers.clear()
            self._candidates.clear()
            self._model = model.name

    def _row(self, point: dict[str, Any]) -> SweepRow:
        try:
            request = request_at(point, self._step)
            shared = self._shared(request)
            candidate = self._candidate(shared, point["optimizer"])
            fields = self._figures(Workload(request), shared, candidate) | self._times(request, shared, candidate)
        except ConfigError as error:
            return self._refused(point, str(error))
        return SweepRow(
            **self._identity(request, candidate.id, candidate.implementation, candidate.settings),
            limit_bytes=self._limit_of(request.gpu),
            **fields,
        )

    def _figures(self, own: Workload, shared: Workload, candidate: Candidate) -> dict[str, Any]:
        """The bytes of a row; `own` knows the GPU's memory, `shared` has simulated the step."""
        resident, peaks, limit = own.resident(candidate), shared.peaks(candidate), self._limit_of(own.request.gpu)
        limit = min(limit, own.usable_bytes)
        fields: dict[str, Any] = {
            "parameters_bytes": resident.parameters,
            "gradients_bytes": resident.gradients,
            "master_weights_bytes": resident.master_weights,
            "optimizer_state_bytes": resident.optimizer_state,
        }
        if peaks is None:
            return fields | {"fits": None if resident.total <= limit else False}
        return fields | {
            "peak_allocated_bytes": peaks.peak_bytes,
            "peak_phase": peaks.peak_phase,
            "peak_reserved_bytes": peaks.reserved_bytes,
            "device_bytes": peaks.reserved_bytes + own.request.gpu.outside_bytes,
            "headroom_bytes": limit - peaks.peak_bytes,
            "fits": peaks.peak_bytes <= limit and not _is_fragmented(own, candidate, peaks, limit),
        }

    def _times(self, request: StepRequest, shared: Workload, candidate: Candidate) -> dict[str, Any]:
        """The time of a row's step; GPUs that share a workload take their own."""
        timer = self._timers.setdefault(id(shared), StepTimer(shared))
        seconds, config = timer.seconds(candidate, gpu=request.gpu), request.config
        if seconds is None:
            return {}
        tokens = config.batch_size * config.seq_len * config.grad_accum * config.gpus
        return {"step_seconds": seconds.step, "tokens_per_second": tokens / seconds.step}

    def _identity(
        self, request: StepRequest, optimizer: str, implementation: str, settings: dict[str, Any]
    ) -> dict[str, Any]:
        """What a row is about."""
        config = request.config
        sizes = ("gpus", "sharding", "precision", "batch_size", "seq_len", "grad_accum", "checkpointing", "attention")
        return {
            "model": request.model.name,
            "num_parameters": request.model.num_parameters,
            "gpu": request.gpu.id,
            "usable_bytes": request.gpu.usable_bytes,
            "optimizer": optimizer,
            "implementation": implementation,
            "options": {key: value for key, value in settings.items() if key != "implementation"},
            **{name: getattr(config, name) for name in sizes},
        }

    def _refused(self, point: dict[str, Any], reason: str) -> SweepRow:
        model, gpu, choice = point["model"], point["gpu"], point["optimizer"]
        return SweepRow(
            model=model.name,
            gpu=gpu.id,
            gpus=point["layout"][0],
            sharding=point["layout"][1],
            usable_bytes=gpu.usable_bytes,
            limit_bytes=self._limit_of(gpu),
            optimizer=choice.id,
            implementation=choice.optimizer.implementation,
            options={key: value for key, value in settings_of(choice.optimizer).items() if key != "implementation"},
            precision=point["precision"],
            batch_size=point["batch_size"],
            seq_len=point["seq_len"] or default_seq_len(model),
            grad_accum=self._step.get("grad_accum", 1),
            checkpointing=point["checkpointing"],
            attention=self._step.get("attention") or default_attention(model),
            num_parameters=model.num_parameters,
            reason=reason,
        )

    def _limit_of(self, gpu: Gpu) -> int:
        return gpu.usable_bytes if self._limit is None else min(gpu.usable_bytes, self._limit)

    def _shared(self, request: StepRequest) -> Workload:
        """The step of a request, one for all GPUs on which it is the same."""
        gpu = request.gpu
        key = (gpu.compute_capability, gpu.sm_count, gpu.vendor, request.config)
        if key not in self._workloads:
            self._workloads[key] = Workload(request)
        return self._workloads[key]

    def _candidate(self, workload: Workload, choice: OptimizerChoice) -> Candidate:
        """The optimizer bound to a step; one that was not named may be taken in another implementation."""
        key = (id(workload), choice.id)
        if key not in self._candidates:
            bind = bind_candidate if choice.explicit else bind_runnable
            try:
                self._candidates[key] = bind(workload.request, choice.optimizer)
            except ConfigError as error:
                self._candidates[key] = error
        found = self._candidates[key]
        if isinstance(found, ConfigError):
            raise found
        return found


def _is_fragmented(own: Workload, candidate: Candidate, peaks: StepPeaks, limit: int) -> bool:
    """Whether an estimate refuses a step with room by bytes; within a budget below the GPU's memory bytes decide."""
    own.remember(candidate.optimizer, peaks)
    return limit == own.usable_bytes and own.shortage(candidate) is not None
