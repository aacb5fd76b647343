"""How many GPUs a step runs on, how they divide it and which figures are of each, in the words of every renderer."""

from __future__ import annotations

from optplan.planner.records import StepConfig


def gpus_in_words(config: StepConfig) -> str:
    """How many GPUs on how many nodes, and how they divide the work."""
    if config.gpus == 1:
        return "one GPU"
    ways = [
        *([config.sharding] if config.sharding != "none" else []),
        *([f"tensor parallel {config.tensor_parallel}"] if config.tensor_parallel > 1 else []),
        *(["sequence parallel"] if config.sequence_parallel else []),
        *([f"{config.pipeline_parallel} stages, {config.pipeline_schedule}"] if config.pipeline_parallel > 1 else []),
    ]
    nodes = f" on {config.nodes} nodes" if config.nodes > 1 else ""
    return f"{config.gpus} GPUs{nodes}, {', '.join(ways)}"


def per_gpu(config: StepConfig) -> str:
    """What follows the name of a figure that each of several GPUs has; empty on one."""
    return " per GPU" if config.gpus > 1 else ""


def per_copy(config: StepConfig) -> str:
    """What follows a micro-batch: several GPUs have one each, or those together that share a copy of the model."""
    shared = config.tensor_parallel * config.pipeline_parallel > 1
    return " per copy of the model" if shared else per_gpu(config)
