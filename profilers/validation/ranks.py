"""Several processes of one step: where they meet, and which of them tells why it failed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from optplan.profilers.validation.launching import Process

_HOST = "127.0.0.1"


class Meeting(NamedTuple):
    """A store of this process by which ranks find each other, as `torchrun` keeps one for those that it starts.

    No port is chosen beforehand, which another program could take before a rank listens there: the system gives one to
    the store, and the ranks are told of it. The store also outlives every rank.

    Attributes:
        store: Answers as long as it is kept.
        variables: The environment variables of each rank.
    """

    store: Any
    variables: list[dict[str, str]]


def arrange_meeting(num_ranks: int) -> Meeting:
    """A meeting of so many processes of this machine."""
    from torch._C._distributed_c10d import TCPStore

    store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": _HOST,
        "MASTER_PORT": str(store.port),
        # By this torch's `env://` knows that none of the ranks is to make the store.
        "TORCHELASTIC_USE_AGENT_STORE": str(True),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    return Meeting(store, [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)])


def has_failed(processes: Sequence[Process]) -> bool:
    """Whether one of them ended otherwise than it should."""
    return any(process.status for process in processes)


def last_words(processes: Sequence[Process]) -> str:
    """Of the first process that says why it failed, and which of several ranks a signal has ended before."""
    told = [process.last_words() for process in processes]
    words = next((words for words in told if words.startswith("optplan:")), None)
    # What a rank says whose peer is gone is that it is gone.
    statuses = [process.status or 0 for process in processes]
    ended = [f"rank {rank} of {len(statuses)} was ended by signal {-n}" for rank, n in enumerate(statuses) if n < 0]
    if len(processes) == 1 or not ended:
        return words or told[0]
    return "; ".join([*ended, *([words] if words else [])])
