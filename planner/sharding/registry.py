"""The strategies by the names that `--sharding` takes."""

from __future__ import annotations

from collections.abc import Callable

from optplan.planner.sharding.base import Ranks, Strategy
from optplan.planner.sharding.ddp import Ddp
from optplan.planner.sharding.deepspeed import DeepSpeed
from optplan.planner.sharding.fsdp2 import Fsdp2
from optplan.planner.sharding.zero1 import Zero1

_STRATEGIES: dict[str, Callable[[Ranks], Strategy]] = {
    "ddp": Ddp,
    "ddp-copies": lambda ranks: Ddp(ranks, views=False),
    "zero1": Zero1,
    "zero1-deepspeed": lambda ranks: DeepSpeed(ranks, stage=1),
    "zero2": lambda ranks: DeepSpeed(ranks, stage=2),
    "zero3": lambda ranks: Fsdp2(ranks, name="zero3"),
    "fsdp2": Fsdp2,
    "fsdp2-noreshard": lambda ranks: Fsdp2(ranks, name="fsdp2-noreshard", reshards=False),
    "fsdp2-hybrid": lambda ranks: Fsdp2(ranks, name="fsdp2-hybrid", shard_ranks=ranks.gpus_per_node),
    "fsdp2-offload": lambda ranks: Fsdp2(ranks, name="fsdp2-offload", offloads=True),
}
SHARDINGS = ("none", *_STRATEGIES)
"""What `--sharding` takes."""
FULL_SHARDINGS = tuple(name for name in SHARDINGS if name.startswith("fsdp2") or name == "zero3")
"""Those under which `--precision mixed` means fp32 shards."""

TRACED_SHARDINGS = ("ddp", "ddp-copies", "zero1", "fsdp2", "fsdp2-noreshard")
"""Those that torch alone runs, so that a trace can."""


def strategy_of(name: str, ranks: Ranks) -> Strategy | None:
    """The strategy called `name` for these processes; None for none."""
    return None if name == "none" else _STRATEGIES[name](ranks)


def num_communicators(name: str) -> int:
    """Groups of ranks that exchange data under the strategy called `name`."""
    if name == "none":
        return 0
    return 2 if name == "fsdp2-hybrid" else 1
