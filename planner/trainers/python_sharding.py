"""The parts of a training script that divide the work among several GPUs."""

from __future__ import annotations

from optplan.planner.trainers.job import TrainingJob
from optplan.planner.trainers.optimizer_code import OptimizerCode
from optplan.planner.trainers.shardings import is_distributed, is_fsdp


def sharding_imports(job: TrainingJob) -> list[str]:
    """What the script imports for its way of sharding."""
    lines: list[str] = []
    if job.config.sharding == "fsdp2-hybrid":
        lines.append("from torch.distributed.device_mesh import init_device_mesh")
    if is_fsdp(job):
        offload = "CPUOffloadPolicy, " * (job.config.sharding == "fsdp2-offload")
        lines.append(f"from torch.distributed.fsdp import {offload}MixedPrecisionPolicy, fully_shard")
    if job.config.sharding == "zero1":
        lines.append("from torch.distributed.optim import ZeroRedundancyOptimizer")
    return lines


def sharding_lines(job: TrainingJob) -> list[str]:
    """Statements that wrap `model`."""
    config = job.config
    if not is_distributed(job):
        return []
    if not is_fsdp(job):
        views = config.sharding != "ddp-copies"
        return [
            "model = torch.nn.parallel.DistributedDataParallel(",
            f"    model, device_ids=[device.index], gradient_as_bucket_view={views}",
            ")",
        ]
    reshard = config.sharding != "fsdp2-noreshard"
    policy = "MixedPrecisionPolicy()"
    if config.precision == "mixed":
        policy = "MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)"
    return [
        "layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))",
        f"options = dict(mp_policy={policy}, reshard_after_forward={reshard})",
        *_fsdp_extras(job),
        "for layer in layers:",
        "    fully_shard(layer, **options)",
        "fully_shard(model, **options)",
    ]


def _fsdp_extras(job: TrainingJob) -> list[str]:
    config = job.config
    if config.sharding == "fsdp2-offload":
        return ['options["offload_policy"] = CPUOffloadPolicy()']
    if config.sharding == "fsdp2-hybrid":
        shape = (config.nodes, config.gpus // config.nodes)
        return [f'options["mesh"] = init_device_mesh("cuda", {shape}, mesh_dim_names=("replicate", "shard"))']
    return []


def zero1_optimizer(job: TrainingJob, code: OptimizerCode, *, target: str) -> list[str]:
    """The function that builds torch's `ZeroRedundancyOptimizer`.

    Raises:
        ConfigError: The optimizer is not one class over parameters.
    """
    if not code.takes_parameters_alone:
        raise job.refuse(target, f"{job.optimizer} needs the model itself, not a rank's share of its parameters")
    keywords = "".join(f", {key}={value!r}" for key, value in code.keywords.items())
    built = f"ZeroRedundancyOptimizer(model.parameters(), {code.name}, lr=LEARNING_RATE{keywords})"
    return ["def make_optimizer(model):", f"    return {built}"]
