"""One training step taken by several processes, each measured; started by `torchrun`.

What the ranks find goes to rank 0 through the store by which they met, not through a collective: the store still
answers when a rank has run out of memory and the others wait for it.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from optplan.planner.errors import ConfigError, OptplanError
from optplan.planner.measured.measurement import Measurement, RankRow
from optplan.profilers.workloads.sharded_modules import FULLY_SHARDED, REPLICATED

PROFILED_SHARDINGS = (*REPLICATED, *FULLY_SHARDED)
"""What `optplan profile --sharding` takes."""

_PATIENCE_SECONDS = 60.0
"""How long a rank waits for the others after its own end."""
_POLL_SECONDS = 0.05
_TIMEOUT = datetime.timedelta(minutes=10)
"""After which a collective that others do not join fails."""


class Launch(msgspec.Struct, frozen=True):
    """How this process was started.

    Attributes:
        rank: Its number among all processes.
        local_rank: Its number on this machine, which is its GPU's.
        num_ranks: All processes.
        num_nodes: The machines.
    """

    rank: int
    local_rank: int
    num_ranks: int
    num_nodes: int


def find_launch(environment: Mapping[str, str] | None = None) -> Launch | None:
    """What `torchrun` says of this process, None if it was started alone.

    Args:
        environment: Its environment variables, the process's own if None.
    """
    found = os.environ if environment is None else environment
    num_ranks = int(found.get("WORLD_SIZE", "1"))
    if "RANK" not in found or num_ranks == 1:
        return None
    on_this_machine = int(found.get("LOCAL_WORLD_SIZE", num_ranks))
    return Launch(
        int(found["RANK"]), int(found.get("LOCAL_RANK", found["RANK"])), num_ranks, num_ranks // on_this_machine
    )


def check_launch(launch: Launch | None, sharding: str) -> None:
    """Refuse a launch that does not go with `--sharding`.

    Raises:
        ConfigError: Several processes without a strategy, a strategy without several, or one that cannot be run.
    """
    known = ", ".join(PROFILED_SHARDINGS)
    if launch is None and sharding != "none":
        raise ConfigError(
            f"--sharding {sharding} is measured by several processes: start them with "
            "torchrun --nproc-per-node 2 -m optplan profile ..."
        )
    if launch is not None and sharding == "none":
        raise ConfigError(f"{launch.num_ranks} processes were started, but --sharding says none; allowed: {known}")
    if sharding not in ("none", *PROFILED_SHARDINGS):
        raise ConfigError(f"--sharding {sharding} cannot be profiled in this version; allowed: {known}")


def measure_together(launch: Launch, device: torch.device, measure: Callable[[], Measurement]) -> Measurement | None:
    """Measure on every rank and put the record together; None on every rank but the first.

    Args:
        launch: How this process was started.
        device: Where this rank trains.
        measure: Measures this rank's step; the process group is there.

    Raises:
        OptplanError: This rank failed.
        OtherRankError: It failed because another one did.
    """
    with _process_group(launch, device) as store:
        record = measure()
        store.set(f"rank {launch.rank}", msgspec.json.encode(rank_row(launch.rank, record)))
        if launch.rank == 0:
            return _gathered(store, launch, record)
        # A rank that ran out of memory and left at once would take rank 0 with it.
        if not _wait_for(store, "done", _deadline()):
            raise OptplanError(f"rank 0 of {launch.num_ranks} did not end: {_how_it_ended(launch, record)}")
        store.set(f"rank {launch.rank} left", "")
    return None


@contextmanager
def _process_group(launch: Launch, device: torch.device) -> Iterator[Any]:
    """The ranks' group; what is yielded is a store that all of them see."""
    from torch._C._distributed_c10d import PrefixStore

    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, num_ranks = _meet(launch)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=_TIMEOUT)
    own = PrefixStore("optplan", store)
    try:
        yield own
    except Exception as error:
        # The first that fails speaks; the others fail because of it. The group is left to the process's end: to leave
        # it in order would be to wait for them.
        if own.add("failures", 1) > 1:
            raise OtherRankError from error
        raise _with_rank(error, launch) from error
    dist.destroy_process_group()


def _meet(launch: Launch) -> tuple[Any, int, int]:
    """The store by which the ranks meet, this rank's number and how many there are.

    Raises:
        ConfigError: They do not meet where the launch says.
    """
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, num_ranks = next(rendezvous("env://", timeout=datetime.timedelta(seconds=_PATIENCE_SECONDS)))
    except (dist.DistError, ValueError) as error:
        raise ConfigError(_why_apart(launch, str(error))) from error
    return store, rank, num_ranks


def _why_apart(launch: Launch, reason: str) -> str:
    rank, port = f"rank {launch.rank} of {launch.num_ranks}", os.environ.get("MASTER_PORT")
    if "EADDRINUSE" in reason:
        return (
            f"{rank} cannot listen on port {port}, where the ranks are to meet: another program does; give them "
            "another MASTER_PORT, or start them with torchrun --standalone, which takes a free one"
        )
    place = f" at port {port} (MASTER_PORT)" if port is not None else ""
    return f"{rank} did not meet the others{place}: {' '.join(reason.split())[:400]}"


class OtherRankError(OptplanError):
    """A failure of which another rank tells."""


def _with_rank(error: Exception, launch: Launch) -> Exception:
    if isinstance(error, OptplanError):
        return error
    sentence = " ".join(str(error).split())[:400]
    return OptplanError(f"rank {launch.rank} of {launch.num_ranks} failed: {type(error).__name__}: {sentence}")


def _how_it_ended(launch: Launch, record: Measurement) -> str:
    if record.out_of_memory is None:
        return f"rank {launch.rank} had taken its steps"
    return f"rank {launch.rank} had run out of memory in {record.out_of_memory.phase}"


def _gathered(store: Any, launch: Launch, record: Measurement) -> Measurement:
    rows, missing, deadline = [], [], _deadline()
    for rank in range(launch.num_ranks):
        key = f"rank {rank}"
        if _wait_for(store, key, deadline):
            rows.append(msgspec.json.decode(store.get(key), type=RankRow))
        else:
            missing.append(f"rank {rank} told nothing within {_PATIENCE_SECONDS:.0f} s of the end of rank 0")
    store.set("done", "")
    # The store is rank 0's, and the others still ask it.
    for row in rows[1:]:
        _wait_for(store, f"rank {row.rank} left", deadline)
    return msgspec.structs.replace(record, ranks=rows, notes=[*record.notes, *missing])


def _deadline() -> float:
    return time.monotonic() + _PATIENCE_SECONDS


def _wait_for(store: Any, key: str, deadline: float) -> bool:
    """Whether a key is there, at last."""
    while not store.check([key]):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def rank_row(rank: int, record: Measurement) -> RankRow:
    """What a rank tells of its own measurement."""
    return RankRow(
        rank=rank,
        bytes=record.bytes,
        state_tensors=record.state_tensors,
        phases=record.phases,
        peak_allocated_bytes=record.peak_allocated_bytes,
        peak_reserved_bytes=record.peak_reserved_bytes,
        device_bytes=record.device_bytes,
        step_seconds=record.time.step_seconds if record.time else None,
        out_of_memory=record.out_of_memory,
    )
