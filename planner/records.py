"""The saved types: what an estimate says, in the JSON form that users and tests rely on."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from optplan.planner.timeline import Category, Phase

ESTIMATE_SCHEMA: Literal["optplan.estimate/1"] = "optplan.estimate/1"


class ModelRow(msgspec.Struct, frozen=True):
    """The model an estimate is about."""

    name: str
    num_parameters: int
    source: str


class GpuRow(msgspec.Struct, frozen=True, omit_defaults=True):
    """The GPU an estimate is held against; bytes per GPU.

    Attributes:
        total_bytes: Memory that the driver reports.
        usable_bytes: What is left for torch's allocator once context and communication library are loaded.
        context_bytes: CUDA context and loaded kernels; 0 for a budget given with `--memory`.
        communication_bytes: What the communication library takes besides; 0 on one GPU and for a budget.
        communication_basis: `measured` or `estimated`, empty where there is none.
    """

    name: str
    total_bytes: int
    usable_bytes: int
    context_bytes: int
    communication_bytes: int = 0
    communication_basis: str = ""


class StepConfig(msgspec.Struct, frozen=True):
    """How the step is run, apart from the optimizer.

    `gpus` counts those of all `nodes`. `alloc_conf` are the settings of torch's allocator as in
    `PYTORCH_CUDA_ALLOC_CONF`, empty for torch's own.
    """

    precision: str
    batch_size: int
    seq_len: int
    grad_accum: int
    checkpointing: str
    attention: str
    gpus: int
    sharding: str
    alloc_conf: str = ""
    fused_loss: str = "none"
    step_in_backward: bool = False
    clip_grad_norm: float | None = None
    keep_grads: bool = False
    padding_mask: bool = False
    empty_cache: bool = False
    nodes: int = 1
    tensor_parallel: int = 1
    sequence_parallel: bool = False
    pipeline_parallel: int = 1
    pipeline_schedule: str = "1f1b"


class ResidentBytes(msgspec.Struct, frozen=True):
    """Bytes of the tensors that live across the step, unrounded, per GPU.

    `optimizer_state` counts what lives on the device: step counters and paged state kept on the host are left out.
    """

    parameters: int
    gradients: int
    master_weights: int
    optimizer_state: int

    @property
    def total(self) -> int:
        """All four together."""
        return self.parameters + self.gradients + self.master_weights + self.optimizer_state


class PhasePeak(msgspec.Struct, frozen=True):
    """The largest number of allocated bytes within one phase of a steady step (every one after the first)."""

    peak_allocated_bytes: int


class TensorRow(msgspec.Struct, frozen=True):
    """One state tensor of one parameter (`--per-tensor`)."""

    parameter: str
    state: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    bytes: int


class Saving(msgspec.Struct, frozen=True):
    """How much less than AdamW (its default implementation, same step) an optimizer needs; negative if it needs more.

    Attributes:
        state_bytes: AdamW's resident optimizer state less this optimizer's.
        peak_bytes: AdamW's peak of the step less this optimizer's, None without step rules.
    """

    state_bytes: int
    peak_bytes: int | None

    @property
    def surviving(self) -> float | None:
        """Share of the saving in state that is still there at the peak, None where there is no saving to survive."""
        if self.peak_bytes is None or self.state_bytes <= 0:
            return None
        return self.peak_bytes / self.state_bytes


class Skipped(msgspec.Struct, frozen=True):
    """An optimizer left out of a table of all, and why it cannot run this step."""

    optimizer: str
    reason: str


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """What one optimizer needs for the configured step; bytes per GPU, peaks in allocated bytes.

    `state_variants` holds the state's bytes under other values of an option that training may move, such as the rank
    of Adapprox between its best case and what must be reserved; empty for most optimizers.
    `peak_reserved_range_bytes` are the least and the most reserved bytes that the addresses of segments, which the
    driver chooses, leave open; known to the trace engine.
    Everything that depends on the step's timeline is None for a model family without step rules.
    """

    optimizer: str
    implementation: str
    options: dict[str, Any]
    bytes: ResidentBytes
    state_tensors: dict[str, int]
    phases: dict[Phase, PhasePeak] | None = None
    peak_allocated_bytes: int | None = None
    peak_phase: Phase | None = None
    peak_categories: dict[Category, int] | None = None
    peak_reserved_bytes: int | None = None
    peak_reserved_range_bytes: tuple[int, int] | None = None
    device_bytes: int | None = None
    fits: bool | None = None
    headroom_bytes: int | None = None
    max_batch_size: int | None = None
    step_seconds: dict[str, float] | None = None
    state_variants: dict[str, int] = {}
    saving_against_adamw: Saving | None = None
    notes: list[str] = []
    per_tensor: list[TensorRow] | msgspec.UnsetType = msgspec.UNSET


class Recommendation(msgspec.Struct, frozen=True):
    """The configuration to run, why, and the command that reproduces its estimate."""

    optimizer: str
    implementation: str
    options: dict[str, Any]
    config: StepConfig
    reasons: list[str]
    command: str


class EstimateReport(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `optplan estimate`: one model, one GPU, one step, any number of optimizers."""

    schema: Literal["optplan.estimate/1"] = ESTIMATE_SCHEMA
    version: str
    engine: str
    model: ModelRow
    gpu: GpuRow
    config: StepConfig
    estimates: list[Estimate]
    recommendation: Recommendation | None
    skipped: list[Skipped] = []
    notes: list[str] = []
