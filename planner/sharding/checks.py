"""What of several GPUs a request may ask for: every number in range, no two options in contradiction."""

from __future__ import annotations

from optplan.planner.errors import ConfigError
from optplan.planner.models.spec import ModelSpec
from optplan.planner.records import StepConfig
from optplan.planner.sharding.registry import FULL_SHARDINGS, SHARDINGS

_DEEPSPEED = ("zero1-deepspeed", "zero2")


def check_sharding(config: StepConfig, model: ModelSpec, *, engine: str) -> None:
    """Refuse what is not described or contradicts itself.

    Raises:
        ConfigError: The sentence says what, and what to ask for instead.
    """
    _check_counts(config)
    if config.sharding == "none":
        return
    name = f"--sharding {config.sharding}"
    if engine == "trace":
        raise ConfigError(f"{name} is modelled by --engine rules alone in this version, not by trace")
    if config.step_in_backward:
        raise ConfigError(f"{name} and --step-in-backward contradict each other: gradients are passed on in groups")
    _check_precision(config, name)
    if config.sharding in FULL_SHARDINGS:
        _check_full(config, model, name)


def _check_counts(config: StepConfig) -> None:
    if config.gpus > 1 and config.sharding == "none":
        known = ", ".join(SHARDINGS[1:])
        raise ConfigError(f"--gpus {config.gpus} needs a --sharding strategy: {known}")
    if config.sharding != "none" and config.gpus == 1:
        raise ConfigError(f"--sharding {config.sharding} needs --gpus of at least 2, got 1")
    if config.gpus % config.nodes:
        raise ConfigError(
            f"--nodes must divide --gpus, which counts the GPUs of all nodes: got {config.gpus} GPUs on "
            f"{config.nodes} nodes"
        )
    if config.sharding == "fsdp2-hybrid" and (config.nodes == 1 or config.nodes == config.gpus):
        raise ConfigError(
            "--sharding fsdp2-hybrid shards within a node and repeats the shards across nodes: it needs several nodes "
            f"of several GPUs, got {config.gpus} GPUs on {config.nodes} node{'s' * (config.nodes > 1)}; use fsdp2"
        )


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
