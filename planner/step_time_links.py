"""What several GPUs pass to each other in one step: bytes by phase under each sharding, and how fast the links are.

A collective over N ranks passes (N - 1) / N of its bytes through every link, an all-reduce twice that. Under full
sharding every micro-step gathers and reduces; otherwise gradients are reduced once a step, save under zero2.

Source: `data/clusters.toml`; torch `_fsdp_param_group.py`, `nn/parallel/distributed.py`; DeepSpeed `stage_1_and_2.py`.
"""

from __future__ import annotations

import msgspec

from optplan.planner.dtypes import ITEMSIZE_BYTES
from optplan.planner.request import StepRequest
from optplan.planner.sharding.clusters import cluster_of
from optplan.planner.sharding.registry import FULL_SHARDINGS

_REDUCED_ONCE = ("ddp", "ddp-copies", "zero1", "zero1-deepspeed")


class LinkTraffic(msgspec.Struct, frozen=True):
    """Bytes through the links of one GPU: in each micro-step's forward and backward, and once a step."""

    forward_bytes: float = 0.0
    backward_bytes: float = 0.0
    step_bytes: float = 0.0


def link_traffic(request: StepRequest) -> LinkTraffic:
    """What one GPU passes on."""
    config, policy, count = request.config, request.policy, request.model.num_parameters
    if config.gpus == 1:
        return LinkTraffic()
    share = (config.gpus - 1) / config.gpus
    mixed = config.precision == "mixed" and config.sharding in FULL_SHARDINGS
    parameters = share * count * (2 if mixed else ITEMSIZE_BYTES[policy.parameter_dtype])
    gradients = share * count * ITEMSIZE_BYTES[policy.gradient_dtype]
    if config.sharding in FULL_SHARDINGS:
        again = 0.0 if config.sharding == "fsdp2-noreshard" else parameters
        return LinkTraffic(forward_bytes=parameters, backward_bytes=again + gradients)
    if config.sharding in _REDUCED_ONCE:
        passed_on = 0.0 if config.sharding.startswith("ddp") else parameters
        return LinkTraffic(step_bytes=2 * gradients + passed_on)
    return LinkTraffic(backward_bytes=gradients, step_bytes=parameters)


def link_bytes_per_s(request: StepRequest) -> float:
    """Bytes per second in one direction of the slowest link between the GPUs."""
    cluster = cluster_of(request.gpu.id)
    return cluster.network_bytes_per_s if request.config.nodes > 1 else cluster.node_link_bytes_per_s
