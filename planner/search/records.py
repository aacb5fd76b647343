"""What the search answers: the configuration to run, what else there is, and why everything else was not chosen."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from optplan.planner.records import GpuRow, ModelRow, StepConfig
from optplan.planner.search.evidence import Evidence
from optplan.planner.step_time_rates import LinkBasis

RECOMMEND_SCHEMA: Literal["optplan.recommend/1"] = "optplan.recommend/1"

Prefer = Literal["speed", "quality", "memory"]
Verdict = Literal["fits", "tight", "does not fit"]
TimeBasis = Literal["calibrated", "scaled", "assumed"]
Outcome = Literal["recommended", "on the front", "beaten", "tight", "does not fit", "cannot run"]


class Time(msgspec.Struct, frozen=True, kw_only=True):
    """Time of one step of a configuration.

    Attributes:
        step_seconds: The whole step with all its micro-steps; likewise by phase.
        tokens_per_second: Of all GPUs together.
        bound: What decides: the GPU's work, the host's launches, or the links between GPUs.
        basis: `calibrated` on the GPU the model was fitted to, `scaled` by the data sheet on any other, `assumed` where
            a memory budget stands for a GPU and an H200's rates are taken.
        optimizer_basis: Whether the optimizer's own time rests on a measurement or on a likeness.
        link_basis: What the links' rates rest on, on several GPUs: `measured`, `cited` or `estimated`.
        median_error: Of the time model on measured steps of models that it was not fitted to and that GPU or host
            decided as they do here, or that several GPUs shared, as a share of their time; likewise the largest. They
            hold for GPUs of the calibrated kind.
    """

    step_seconds: float
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float
    tokens_per_second: float
    bound: Literal["gpu", "host", "link"]
    basis: TimeBasis
    optimizer_basis: Literal["measured", "estimated"]
    link_basis: LinkBasis | None = None
    median_error: float
    largest_error: float


class Configuration(msgspec.Struct, frozen=True, kw_only=True):
    """One configuration with everything needed to run it.

    Attributes:
        optimizer: Id in the registry.
        implementation: Which implementation.
        options: Every option with its value; `settings` holds those that are not defaults.
        state_dtype: Dtype asked for the moments, None for the optimizer's own choice.
        config: How the step is run: precision, micro-batch, accumulation, checkpointing, GPUs ...
        tokens_per_step: Tokens of one optimizer step over all GPUs.
        verdict: Whether it fits; `tight` if its peak does and what the allocator reserves leaves less than the room
            that the validated error asks for.
        peak_allocated_bytes: The peak on each GPU: simulated where `is_simulated`, else the sum of rounded requests,
            which measured steps exceed by up to 3.6 %.
        peak_reserved_bytes: What the allocator reserves, None where it was not simulated.
        margin_bytes: Usable bytes less the peak.
        time: None for a family without step rules.
        evidence: What is known of its quality.
        command: The `optplan estimate` command that prints its memory.
    """

    optimizer: str
    implementation: str
    options: dict[str, Any]
    settings: dict[str, Any]
    state_dtype: str | None
    config: StepConfig
    tokens_per_step: int
    verdict: Verdict
    peak_allocated_bytes: int
    is_simulated: bool
    peak_reserved_bytes: int | None
    margin_bytes: int
    time: Time | None
    evidence: Evidence
    command: str


class Alternative(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one choice.

    Attributes:
        optimizer: Id in the registry.
        implementation: Which implementation; likewise its settings and the dtype asked for its state.
        precision: The number formats it was tried under.
        gpus: The number of GPUs; `sharding` is how they divide the work.
        outcome: What became of it.
        reason: The constraint that excludes it, or what is better and by how much.
        best: Its best configuration, None if none fits.
        beaten_by: The configuration that is at least as good in memory, time and evidence.
    """

    optimizer: str
    implementation: str
    settings: dict[str, Any]
    state_dtype: str | None
    precision: str
    gpus: int
    sharding: str
    outcome: Outcome
    reason: str
    best: Configuration | None = None
    beaten_by: Configuration | None = None


class Decided(msgspec.Struct, frozen=True, kw_only=True):
    """How many configurations of the space each rule decided; together they are all of them.

    Attributes:
        declared: Size of the space.
        cannot_run: The optimizer, the model's class or the GPU refuses.
        larger_batch: The same with as small a micro-batch, or a smaller one, does not fit beside the smallest state.
        resident: Parameters, master weights and state alone do not fit.
        memory: The peak does not fit.
        beaten: Another one is at least as good in memory, time and evidence.
        front: On the front for a while; those on it at the end are in `front` of the report.
    """

    declared: int
    cannot_run: int
    larger_batch: int
    resident: int
    memory: int
    beaten: int
    front: int


class FitChange(msgspec.Struct, frozen=True):
    """A change of the request with which something fits.

    Attributes:
        direction: What is changed: `gpu`, `gpus`, `seq_len`, `budget`, or an option that had been fixed; `together` for
            several GPUs with everything free, where nothing fits by one change.
        text: The change in words.
        configuration: What would then be recommended.
        command: The `optplan recommend` command that says so.
    """

    direction: str
    text: str
    configuration: str
    command: str


class SpaceRow(msgspec.Struct, frozen=True, kw_only=True):
    """The values searched; `fixed` are the options that were given."""

    optimizers: list[str]
    precisions: list[str]
    checkpointing: list[str]
    fused_losses: list[str]
    step_in_backward: list[bool]
    micro_batches: list[int]
    layouts: list[str]
    fixed: dict[str, Any]


class SearchReport(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `optplan recommend`; bytes per GPU.

    Attributes:
        gpus: The numbers of GPUs that were tried.
        limit_bytes: What a configuration may take: the GPU's usable bytes or the budget, less the reserve.
        rule: The stated rule by which the recommendation was picked from the front.
        sequences_per_step: Sequences of one step over all GPUs.
        recommendation: None if nothing fits; a `tight` one only if nothing fits with room.
        reasons: Why it, in sentences; `advice` says what to change in the training recipe.
        runner_up: The next one by the same rule with another optimizer or other number formats.
        front: Configurations that no other beats in memory, time and evidence, the surest first.
        alternatives: Every optimizer, or with `explain` every optimizer with its settings under every precision.
        what_would_fit: The cheapest change in each direction, if nothing fits.
    """

    schema: Literal["optplan.recommend/1"] = RECOMMEND_SCHEMA
    version: str
    model: ModelRow
    gpu: GpuRow
    gpus: list[int]
    limit_bytes: int
    reserve_bytes: int
    prefer: Prefer
    rule: str
    seq_len: int
    sequences_per_step: int
    space: SpaceRow
    decided: Decided
    recommendation: Configuration | None
    reasons: list[str]
    advice: list[str]
    runner_up: Configuration | None
    front: list[Configuration]
    alternatives: list[Alternative]
    what_would_fit: list[FitChange]
    notes: list[str] = []
