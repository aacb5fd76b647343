"""Which program runs which way of sharding."""

from __future__ import annotations

from optplan.planner.trainers.job import TrainingJob

DEEPSPEED_STAGES = {"none": 0, "ddp": 0, "ddp-copies": 0, "zero1-deepspeed": 1, "zero2": 2, "zero3": 3}
DEEPSPEED = ("zero1-deepspeed", "zero2", "zero3")
FSDP = ("fsdp2", "fsdp2-noreshard", "fsdp2-offload", "fsdp2-hybrid")
DDP = ("ddp", "ddp-copies")


def is_fsdp(job: TrainingJob) -> bool:
    """Whether torch's `fully_shard` divides the parameters."""
    return job.config.sharding in FSDP


def is_distributed(job: TrainingJob) -> bool:
    """Whether there is more than one process."""
    return job.config.gpus > 1


def torchrun(job: TrainingJob, what: str) -> str:
    """The command that starts `what` on every GPU, to be given on each node."""
    config = job.config
    nodes = "" if config.nodes == 1 else f" --nnodes {config.nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500"
    return f"torchrun{nodes} --nproc-per-node {config.gpus // config.nodes} {what}"


def ddp_remark(job: TrainingJob, program: str) -> list[str]:
    """That a program's DDP keeps gradients beside its buckets, where the estimate takes them for one."""
    if job.config.sharding != "ddp":
        return []
    return [f"{program} builds DDP without gradient_as_bucket_view: estimate with --sharding ddp-copies"]
