"""What of several GPUs a request may ask for: every number in range, no two options in contradiction."""

from __future__ import annotations

from optplan.planner.errors import ConfigError
from optplan.planner.models.spec import ModelSpec
from optplan.planner.records import StepConfig
from optplan.planner.sharding.base import Ranks
from optplan.planner.sharding.registry import FULL_SHARDINGS, SHARDINGS, TRACED_SHARDINGS

_DEEPSPEED = ("zero1-deepspeed", "zero2")


def data_ranks(config: StepConfig) -> Ranks:
    """The processes that hold copies of one part of the model."""
    copies = config.gpus // (config.tensor_parallel * config.pipeline_parallel)
    return Ranks(copies, config.nodes if copies % config.nodes == 0 else 1)


def check_sharding(config: StepConfig, model: ModelSpec, *, engine: str) -> None:
    """Refuse what is not described or contradicts itself.

    Raises:
        ConfigError: The sentence says what, and what to ask for instead.
    """
    _check_counts(config)
    _check_parallel(config)
    if config.gpus == 1:
        return
    name = _flags(config)
    divides_layers = config.tensor_parallel * config.pipeline_parallel > 1
    if engine == "trace" and (divides_layers or config.sharding not in TRACED_SHARDINGS):
        raise ConfigError(f"{name} is modelled by --engine rules alone in this version, not by trace")
    if config.step_in_backward:
        raise ConfigError(f"{name} and --step-in-backward contradict each other: gradients are passed on in groups")
    _check_precision(config, name)
    if config.sharding in FULL_SHARDINGS:
        _check_full(config, model, name)


def _flags(config: StepConfig) -> str:
    """The option that asks for several GPUs."""
    if config.sharding != "none":
        return f"--sharding {config.sharding}"
    name = "tensor" if config.tensor_parallel > 1 else "pipeline"
    return f"--{name}-parallel {max(config.tensor_parallel, config.pipeline_parallel)}"


def _check_counts(config: StepConfig) -> None:
    parts = config.tensor_parallel * config.pipeline_parallel
    if config.gpus % parts:
        raise ConfigError(
            f"--tensor-parallel times --pipeline-parallel must divide --gpus: got {config.tensor_parallel} times "
            f"{config.pipeline_parallel} of {config.gpus} GPUs"
        )
    copies = config.gpus // parts
    if copies > 1 and config.sharding == "none":
        known = ", ".join(SHARDINGS[1:])
        what = f"--gpus {config.gpus}" if parts == 1 else f"--gpus {config.gpus} in {copies} copies of the model"
        raise ConfigError(f"{what} needs a --sharding strategy: {known}")
    if config.sharding != "none" and copies == 1:
        more = "" if parts == 1 else f", which --tensor-parallel and --pipeline-parallel use up ({parts})"
        least = 2 * parts
        raise ConfigError(f"--sharding {config.sharding} needs --gpus of at least {least}, got {config.gpus}{more}")
    if config.gpus % config.nodes:
        raise ConfigError(
            f"--nodes must divide --gpus, which counts the GPUs of all nodes: got {config.gpus} GPUs on "
            f"{config.nodes} nodes"
        )
    _check_hybrid(config)


def _check_hybrid(config: StepConfig) -> None:
    ranks = data_ranks(config)
    if config.sharding == "fsdp2-hybrid" and (ranks.num_nodes == 1 or ranks.gpus_per_node == 1):
        raise ConfigError(
            "--sharding fsdp2-hybrid shards within a node and repeats the shards across nodes: it needs several nodes "
            f"of several GPUs, got {config.gpus} GPUs on {config.nodes} node{'s' * (config.nodes > 1)}; use fsdp2"
        )


def _check_parallel(config: StepConfig) -> None:
    if config.sequence_parallel and config.tensor_parallel == 1:
        raise ConfigError(
            "--sequence-parallel needs --tensor-parallel of at least 2, whose ranks share the tokens, got 1"
        )
    if config.sequence_parallel and config.seq_len % config.tensor_parallel:
        raise ConfigError(
            f"--sequence-parallel deals out the tokens of a sequence: --seq-len must be a multiple of "
            f"{config.tensor_parallel}, got {config.seq_len}"
        )
    if config.pipeline_parallel > 1 and config.fused_loss != "none":
        raise ConfigError("--pipeline-parallel and --fused-loss are not modelled together")


def _check_precision(config: StepConfig, name: str) -> None:
    if config.sharding in _DEEPSPEED and config.precision != "mixed":
        raise ConfigError(
            f"{name} is DeepSpeed's, which keeps fp32 master weights: use --precision mixed, got {config.precision}"
        )
    if config.sharding == "zero1" and config.precision == "mixed":
        raise ConfigError(
            f"{name} is torch's ZeroRedundancyOptimizer, which has no master weights: use --sharding zero1-deepspeed "
            "with --precision mixed"
        )


def _check_full(config: StepConfig, model: ModelSpec, name: str) -> None:
    if model.model_type == "t5":
        raise ConfigError(
            f"{name} is not modelled for {model.name}, whose decoder layers all read the encoder's output"
        )
    if config.checkpointing == "full-reentrant":
        raise ConfigError(
            f"{name} and --checkpointing full-reentrant are not modelled together; use --checkpointing full"
        )
