"""The saved form of a step that was measured on a GPU or traced without one, and where it was."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from optplan.planner.dtypes import Dtype
from optplan.planner.measured.packed_history import PackedHistory
from optplan.planner.records import GpuRow, ModelRow, PhasePeak, ResidentBytes, StepConfig
from optplan.planner.timeline import Category, Phase

MEASUREMENT_SCHEMA: Literal["optplan.measurement/1"] = "optplan.measurement/1"

Source = Literal["live", "trace"]


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """Where and how a record was made; None is what that place does not have.

    Attributes:
        gpu: Name that the driver reports.
        gpu_total_bytes: Its memory, as the driver reports it.
        other_processes_bytes: Device memory that other processes held when the measurement began.
        driver: Version of the GPU's driver.
        torch: Version of torch; likewise `triton`, `transformers`, `cuda`, `python`, `optplan`.
        alloc_conf: The allocator's settings, as in PYTORCH_CUDA_ALLOC_CONF.
        command: The command that made the record.
        date: Day and time in UTC, ISO 8601.
        commit: Commit of the code, where it ran from a checkout.
        world_size: Number of processes that took the step together.
        rank: Which of them these figures are of.
    """

    gpu: str | None = None
    gpu_total_bytes: int | None = None
    other_processes_bytes: int | None = None
    driver: str | None = None
    cuda: str | None = None
    python: str
    torch: str | None = None
    triton: str | None = None
    transformers: str | None = None
    optplan: str
    alloc_conf: str = ""
    command: str
    date: str
    commit: str | None = None
    world_size: int = 1
    rank: int = 0


class OutOfMemory(msgspec.Struct, frozen=True):
    """How a step ended for which the memory did not suffice.

    Attributes:
        phase: Phase of the allocation that failed.
        requested_bytes: What it asked for, None if the allocator's record does not tell.
        allocated_bytes: What was allocated then.
        message: torch's own words.
    """

    phase: Phase
    requested_bytes: int | None
    allocated_bytes: int
    message: str


class StepTime(msgspec.Struct, frozen=True, kw_only=True):
    """Times of the measured steps, medians in seconds.

    Attributes:
        step_seconds: The whole step, from before forward to the end of the optimizer's step; None where a record's
            own figure cannot be a step's time.
        phases: By phase.
        num_steps: How many steps the medians are of.
        tokens_per_second: Tokens of a step over its time, per GPU.
        optimizer_copy_fraction: Bytes that the optimizer's step must move, over its time, as a share of the copy
            bandwidth measured in the same process.
        copy_bandwidth_bytes_per_second: That bandwidth, bytes read plus bytes written.
        host_launch_seconds: What the host took in the same process to launch one operation of a miniature training
            step that waits for nothing else.
    """

    step_seconds: float | None
    phases: dict[Phase, float]
    num_steps: int
    tokens_per_second: float | None = None
    optimizer_copy_fraction: float | None = None
    copy_bandwidth_bytes_per_second: float | None = None
    host_launch_seconds: float | None = None


class RankRow(msgspec.Struct, frozen=True, kw_only=True):
    """One of the processes that took the step together; its own figures, as the record has them for rank 0.

    Attributes:
        rank: Its number, from 0.
    """

    rank: int
    bytes: ResidentBytes
    state_tensors: dict[str, int]
    phases: dict[Phase, PhasePeak] = {}
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    device_bytes: int | None = None
    step_seconds: float | None = None
    out_of_memory: OutOfMemory | None = None


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """One steady step as it was; bytes per GPU, peaks in allocated bytes.

    Attributes:
        source: `live`, measured on a device, or `trace`, run on tensors without contents.
        device: `cuda`, or `cpu`, where torch has no allocator figures and the peaks are None.
        gpu: The GPU that the step ran on or was traced for.
        state_dtype: Dtype that was asked for the optimizer's moments, None for its own choice.
        bytes: Unrounded bytes of the tensors found alive between two steps.
        state_tensors: Bytes of the optimizer's state on the device, by name.
        peak_allocated_bytes: The largest of the phases' peaks; likewise the fields below as in an estimate.
        peak_requested_bytes: The same in requested bytes, where the allocator counts them.
        device_bytes: Device memory of the process at the end, as the driver reports it, context included.
        device_basis: How `device_bytes` was found: `process` (the driver's figure for this process) or `difference`
            (memory in use on the whole device less what other processes held before).
        losses: Loss of every step, warm-up included.
        out_of_memory: Set where the step did not finish; the peaks are then those reached until that moment.
        history: The steady step event by event, None where it was not recorded.
        ranks: Every process's figures, where several took the step together; all else is of rank 0.
    """

    schema: Literal["optplan.measurement/1"] = MEASUREMENT_SCHEMA
    version: str
    source: Source
    device: Literal["cuda", "cpu"] = "cuda"
    model: ModelRow
    gpu: GpuRow | None
    config: StepConfig
    optimizer: str
    implementation: str
    options: dict[str, Any]
    state_dtype: Dtype | None = None
    bytes: ResidentBytes
    state_tensors: dict[str, int]
    phases: dict[Phase, PhasePeak] = {}
    peak_allocated_bytes: int | None = None
    peak_phase: Phase | None = None
    peak_categories: dict[Category, int] = {}
    peak_reserved_bytes: int | None = None
    peak_requested_bytes: int | None = None
    device_bytes: int | None = None
    device_basis: Literal["process", "difference"] | None = None
    time: StepTime | None = None
    losses: list[float] = []
    out_of_memory: OutOfMemory | None = None
    environment: Environment
    history: PackedHistory | None = None
    notes: list[str] = []
    ranks: list[RankRow] = []
