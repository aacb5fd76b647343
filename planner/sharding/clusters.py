"""The links between GPUs, within a machine and across machines.

Source: `data/clusters.toml`, which names the origin and the day of every row.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files

import msgspec


class Cluster(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kind of machine and what connects several; see the data file for the fields."""

    id: str
    gpus: tuple[str, ...]
    gpus_per_node: int
    node_link: str
    node_link_bytes_per_s: float
    network: str
    network_bytes_per_s: float
    basis: str
    source: str
    as_of: str


@cache
def load_clusters() -> tuple[Cluster, ...]:
    """All rows, in their order."""
    text = files("optplan.planner.data").joinpath("clusters.toml").read_text(encoding="utf-8")
    return tuple(msgspec.convert(row, Cluster) for row in tomllib.loads(text)["cluster"])


def cluster_of(gpu: str) -> Cluster:
    """The kind of machine that a GPU is sold in; the last row where none is known."""
    return next((row for row in load_clusters() if gpu.startswith(row.gpus)), load_clusters()[-1])


def usual_num_nodes(num_gpus: int, gpu: str) -> int:
    """Machines over which so many GPUs are spread when nobody says: as few as hold them, as many GPUs on each."""
    nodes = -(-num_gpus // cluster_of(gpu).gpus_per_node)
    return next(count for count in range(nodes, num_gpus + 1) if num_gpus % count == 0)
