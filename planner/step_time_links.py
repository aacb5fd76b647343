"""What several GPUs pass to each other in one step, and how long it takes.

A collective over N ranks passes (N - 1) / N of its bytes through every rank's link, an all-reduce twice that. Under
full sharding every micro-step gathers and reduces; otherwise gradients are reduced once a step, save under zero2,
beside the last micro-step's backward, and what the optimizer updated is gathered after its step. The rings of a
collective across machines use all network ports of a machine, up to the rate of a rank's own link.

Source: `data/clusters.toml` and the links of `data/step_time.toml`; torch `_fsdp_param_group.py`,
`nn/parallel/distributed.py` and `reducer.cpp` (`mark_variable_ready_dense`); DeepSpeed `stage_1_and_2.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from optplan.planner.dtypes import ITEMSIZE_BYTES
from optplan.planner.request import StepRequest
from optplan.planner.sharding.clusters import Cluster, cluster_of
from optplan.planner.sharding.registry import FULL_SHARDINGS
from optplan.planner.step_time_rates import LinkBasis, TimeModel

_REDUCED_ONCE = ("ddp", "ddp-copies", "zero1", "zero1-deepspeed")


class LinkTraffic(msgspec.Struct, frozen=True):
    """Bytes through the links of one GPU.

    Attributes:
        forward_bytes: In each micro-step's forward.
        backward_bytes: In each micro-step's backward.
        reduced_bytes: In the last micro-step's backward, once a step.
        gathered_bytes: After the optimizer's step.
        replica_bytes: In each micro-step's backward between machines that hold the same shards.
    """

    forward_bytes: float = 0.0
    backward_bytes: float = 0.0
    reduced_bytes: float = 0.0
    gathered_bytes: float = 0.0
    replica_bytes: float = 0.0


class LinkSeconds(msgspec.Struct, frozen=True):
    """Seconds that the links are busy, in the places of `LinkTraffic`."""

    forward: float = 0.0
    backward: float = 0.0
    reduction: float = 0.0
    gather: float = 0.0


def link_traffic(request: StepRequest) -> LinkTraffic:
    """What one GPU passes on."""
    config = request.config
    if config.gpus == 1:
        return LinkTraffic()
    parameters, gradients = _bytes_of(request)
    if config.sharding == "fsdp2-hybrid":
        return _hybrid_traffic(parameters, gradients, config.gpus, config.nodes)
    share = (config.gpus - 1) / config.gpus
    parameters, gradients = share * parameters, share * gradients
    if config.sharding in FULL_SHARDINGS:
        again = 0.0 if config.sharding == "fsdp2-noreshard" else parameters
        return LinkTraffic(forward_bytes=parameters, backward_bytes=again + gradients)
    if config.sharding in _REDUCED_ONCE:
        gathered = 0.0 if config.sharding.startswith("ddp") else parameters
        return LinkTraffic(reduced_bytes=2 * gradients, gathered_bytes=gathered)
    return LinkTraffic(backward_bytes=gradients, gathered_bytes=parameters)


def _bytes_of(request: StepRequest) -> tuple[float, float]:
    """Bytes of the whole model's parameters and gradients as they are passed on."""
    config, policy, count = request.config, request.policy, request.model.num_parameters
    mixed = config.precision == "mixed" and config.sharding in FULL_SHARDINGS
    itemsize = 2 if mixed else ITEMSIZE_BYTES[policy.parameter_dtype]
    return float(count * itemsize), float(count * ITEMSIZE_BYTES[policy.gradient_dtype])


def _hybrid_traffic(parameters: float, gradients: float, num_gpus: int, num_nodes: int) -> LinkTraffic:
    """Sharded within each machine; the machines all-reduce the gradients of their shards."""
    per_node = num_gpus // num_nodes
    share, between = (per_node - 1) / per_node, (num_nodes - 1) / num_nodes
    return LinkTraffic(
        forward_bytes=share * parameters,
        backward_bytes=share * (parameters + gradients),
        replica_bytes=2 * between * gradients / per_node,
    )


def link_seconds(request: StepRequest, *, model: TimeModel) -> LinkSeconds:
    """How long the links are busy."""
    config = request.config
    if config.gpus == 1:
        return LinkSeconds()
    traffic, cluster = link_traffic(request), cluster_of(request.gpu.id)
    within = _node_rate(cluster, model)
    across = min(within, _network_rate(cluster, config.gpus // config.nodes, model)) if config.nodes > 1 else within
    rate = within if config.sharding == "fsdp2-hybrid" else across
    return LinkSeconds(
        traffic.forward_bytes / rate,
        traffic.backward_bytes / rate + traffic.replica_bytes * config.gpus / config.nodes / across,
        traffic.reduced_bytes / rate,
        traffic.gathered_bytes / rate,
    )


def _node_rate(cluster: Cluster, model: TimeModel) -> float:
    return model.link_rates(cluster.node_link).bandwidth_share * cluster.node_link_bytes_per_s


def _network_rate(cluster: Cluster, gpus_per_node: int, model: TimeModel) -> float:
    """Bytes per second of one rank's ring across machines: every port of its machine carries a part of it."""
    share = model.link_rates(cluster.network).bandwidth_share
    return share * cluster.network_bytes_per_s * gpus_per_node


class Reduction(NamedTuple):
    """Gradients that reach the other ranks one by one, as DDP's and DeepSpeed's hooks send them on.

    Attributes:
        num_tensors: How many they are.
        copied_bytes: What is copied into the buckets that are reduced.
    """

    num_tensors: int = 0
    copied_bytes: float = 0.0


def reduction_of(request: StepRequest) -> Reduction:
    """What is reduced one by one: nothing on one GPU or where groups are sharded in full."""
    if request.config.gpus == 1 or request.config.sharding in FULL_SHARDINGS:
        return Reduction()
    return Reduction(len(request.model.trained_parameters), _bytes_of(request)[1])


def is_reduced_once(request: StepRequest) -> bool:
    """Whether gradients are reduced in the last micro-step alone."""
    return request.config.sharding in _REDUCED_ONCE


def link_basis(request: StepRequest, *, model: TimeModel) -> LinkBasis:
    """What the rates of a request's links rest on: the least sure of them."""
    cluster = cluster_of(request.gpu.id)
    names = [cluster.node_link] + ([cluster.network] if request.config.nodes > 1 else [])
    bases = {model.link_rates(name).basis for name in names}
    order: tuple[LinkBasis, ...] = ("estimated", "cited", "measured")
    return next(basis for basis in order if basis in bases)
