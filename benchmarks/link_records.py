"""What recorded collectives say of the links between GPUs: shares of the data sheet, for `fit_step_time.py`.

The bytes that pass through one GPU's link are (N - 1) / N of those gathered or reduced, twice that for an all-reduce.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from optplan.planner.sharding.clusters import Cluster, cluster_of
from optplan.planner.step_time_rates import LinkRates

RECORDS = Path(__file__).resolve().parent / "records"
SCHEMA = "optplan.link-benchmark/1"
SHARDED = ("all_gather", "reduce_scatter")
"""The collectives of sharded training; an all-reduce may be added up in the switch and then says less of the link."""
LEAST_BYTES = 2**26
"""What a layer of a large model passes on; smaller messages are bound by latency."""


def passed_share(collective: str, ranks: int) -> float:
    """Bytes through one rank's link for every byte of the whole tensor."""
    return (ranks - 1) / ranks * (2 if collective == "all_reduce" else 1)


def bus_bytes_per_s(row: dict[str, Any]) -> float:
    """Bytes per second that one record's collective passed through a link."""
    share = passed_share(row["collective"], row["ranks"])
    return float(share * row["num_bytes"] / row["seconds"]["p50"])


def read_link_records(folder: Path = RECORDS) -> list[dict[str, Any]]:
    """All recorded collectives between GPUs."""
    lines = [line for file in sorted(folder.glob("*_links.jsonl")) for line in file.read_text("utf-8").splitlines()]
    return [row for row in map(json.loads, lines) if row["gpu"] is not None]


def measured_shares(folder: Path = RECORDS) -> dict[str, LinkRates]:
    """By link, the share of its rate that the collectives of sharded training reached."""
    rates: dict[str, list[float]] = {}
    for row in read_link_records(folder):
        if row["collective"] in SHARDED and row["num_bytes"] >= LEAST_BYTES:
            cluster: Cluster = cluster_of(row["gpu"])
            share = bus_bytes_per_s(row) / cluster.node_link_bytes_per_s
            rates.setdefault(cluster.node_link, []).append(share)
    source = "benchmarks/records, collectives of 64 MiB and more"
    return {link: LinkRates(link, round(median(found), 3), "measured", source) for link, found in rates.items()}
