"""`optplan.profile_step`: somebody's own training loop measured as it runs."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import nn

from optplan.planner.errors import ConfigError
from optplan.planner.gpus import Gpu, load_gpu
from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.record_files import check_target, save_record
from optplan.planner.records import GpuRow, StepConfig
from optplan.planner.version import VERSION
from optplan.profilers.live.command import this_gpu
from optplan.profilers.live.communication import inner_model, strategy_of
from optplan.profilers.live.describe import describe_model, describe_optimizer, describe_step
from optplan.profilers.live.devices import DeviceMemory, DeviceReader
from optplan.profilers.live.environment import is_first_rank, read_environment
from optplan.profilers.live.measure import (
    INTERRUPTED,
    Speed,
    device_bytes,
    held_by_others,
    profile_fields,
    profile_notes,
    step_time,
)
from optplan.profilers.live.profile import RECORDED_STEP, LiveProfile


class StepProfile:
    """A training loop under observation, as a context.

    The third step inside is recorded event by event, those after it are timed; nothing that the loop computes changes,
    and all hooks are gone when the context ends. Running out of memory is noted and goes on as torch's own error.

    Attributes:
        live: What is being observed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        name: str | None = None,
        gpu: str | None = None,
        out: str | Path | None = None,
        recorded_step: int = RECORDED_STEP,
    ) -> None:
        """Prepare to observe.

        Args:
            model: The module that is trained, on the device on which it is trained.
            optimizer: Its steps end the training steps.
            name: The model's name in the catalogue, so that estimates of it can be held against the record.
            gpu: The GPU's id in the catalogue; found by its own name when None.
            out: File to save the record in when the context ends; of several processes the first alone saves it.
            recorded_step: Which step to record, counted from 0.

        Raises:
            OptplanError: `out` cannot be written.
        """
        self.live = LiveProfile(model, optimizer, recorded_step=recorded_step)
        if out is not None:
            check_target(out)
        self._model, self._optimizer = model, optimizer
        self._name, self._gpu, self._out = name, gpu, out
        self._observing = self.live.observing()
        self._reader = DeviceReader(self.live.device.index or 0) if self.live.device.type == "cuda" else None
        self._before: DeviceMemory | None = None
        self._after: DeviceMemory | None = None
        self._is_interrupted = False

    def __enter__(self) -> Self:
        self._before = self._reader.read() if self._reader else None
        self._observing.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        try:
            self._observing.__exit__(kind, error, trace)
        finally:
            self._after = self._reader.read() if self._reader else None
            if self._out is not None and not is_first_rank():
                pass  # of several processes the first alone writes
            elif self._out is not None and self.live.num_steps:
                save_record(self.measurement(), self._out)
            elif self._out is not None:
                warnings.warn("no optimizer step was taken: there is nothing to save", stacklevel=2)

    def measurement(self) -> Measurement:
        """What has been found so far.

        Raises:
            ConfigError: No step has begun.
        """
        if self.live.call is None:
            raise ConfigError("nothing was measured: the model was not called while it was observed")
        row, config = describe_optimizer(self._optimizer), self._config()
        on_gpu = self.live.device.type == "cuda"
        return Measurement(
            version=VERSION,
            source="live",
            device="cuda" if on_gpu else "cpu",
            model=describe_model(inner_model(self._model), self._name),
            gpu=self._gpu_row() if on_gpu else None,
            config=config,
            optimizer=row.optimizer,
            implementation=row.implementation,
            options=row.options,
            time=step_time(self.live, config, moved_bytes=0, speed=Speed()),
            out_of_memory=self.live.out_of_memory,
            environment=read_environment(
                driver=self._reader.driver if self._reader else None,
                other_processes_bytes=held_by_others(self._before),
            ),
            notes=[*profile_notes(self.live, self._reader), *([INTERRUPTED] if self._is_interrupted else [])],
            **profile_fields(self.live),
            **device_bytes(None, self._after),
        )

    def _config(self) -> StepConfig:
        call = self.live.call
        assert call is not None
        sharding = strategy_of(self._model)
        return describe_step(
            inner_model(self._model),
            inputs=call.shapes,
            autocast=call.autocast,
            num_forwards=call.num_forwards,
            masters=self.live.has_masters,
            sharding=sharding,
        )

    def _gpu_row(self) -> GpuRow | None:
        gpu: Gpu | None = None
        with contextlib.suppress(ConfigError):
            gpu = load_gpu(self._gpu) if self._gpu else this_gpu(self.live.device)
        return None if gpu is None else GpuRow(gpu.id, gpu.total_bytes, gpu.usable_bytes, gpu.context_bytes)


def profile_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    name: str | None = None,
    gpu: str | None = None,
    out: str | Path | None = None,
    recorded_step: int = RECORDED_STEP,
) -> StepProfile:
    """Measure a training loop: `with optplan.profile_step(model, optimizer) as prof:`; see `StepProfile`."""
    return StepProfile(model, optimizer, name=name, gpu=gpu, out=out, recorded_step=recorded_step)
