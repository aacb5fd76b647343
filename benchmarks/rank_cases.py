"""Training steps measured by several processes together, one case after another in one launch.

Starting processes and their group takes longer than most cases, so a launch runs many. Between two of them everything
is given back, libraries' workspaces too, so that each finds an empty allocator; what is left all the same is in its
row. Every rank writes a file a case as soon as it is through. A case in which a rank ran out of memory or failed may
leave the others' collectives unanswered: the ranks then give up their group and form another in the same launch. Only
where they do not come together for that, because one waits in a collective, where memory is left that a failure holds
on to, or where a case takes too long does the launch end; another one goes on behind the case.

NVLink multicast is left alone (`NCCL_NVLS_ENABLE=0`), which containers often forbid.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from optplan.planner.candidates import OptimizerChoice
from optplan.planner.request import StepRequest
from optplan.profilers.live.devices import DeviceReader
from optplan.profilers.live.measure import measure
from optplan.profilers.live.sharded import rank_row

_PATIENCE_SECONDS = 10.0
"""How long a rank waits for the others after a case."""
_POLL_SECONDS = 0.05
_TIMEOUT = datetime.timedelta(minutes=3)
"""After which a collective that others do not join fails, where the library looks for that."""
_CASE_SECONDS = 90.0
"""Longest that a case may take: ranks that wait for each other wait for ever."""
_LEFT_BYTES = 2**20
"""More than this left by a case that failed is memory that the next one would miss."""


class Rank(NamedTuple):
    """One process of the launch.

    Attributes:
        index: Its number.
        count: All of them.
        device: Where it trains.
        store: Where ranks find each other's keys, even if one of them is stuck in a collective; groups have theirs
            apart.
        reader: Asks the driver about the GPU; None on the CPU.
        facts: The GPU's used bytes before torch was there, with the context, and with the communicator.
        backend: How its group talks.
    """

    index: int
    count: int
    device: torch.device
    store: Any
    reader: DeviceReader | None
    facts: dict[str, int]
    backend: str


class Launch(NamedTuple):
    """How processes are started.

    Attributes:
        script: The benchmark, run again by every rank with `--role rank`.
        words: Its command line.
        num_ranks: Processes.
        seconds: After which they are ended.
        case_seconds: After which a case is given up, with its launch.
    """

    script: Path
    words: Sequence[str]
    num_ranks: int
    seconds: float
    case_seconds: float = _CASE_SECONDS


def run_cases(
    cases: Sequence[dict[str, Any]], launch: Launch, folder: Path
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each case with what every rank found, as soon as it is there; a rank that told nothing is left out.

    Args:
        cases: Each needs a `name` of its own.
        launch: How to start; begun again behind a case that ended it.
        folder: Where the ranks write.
    """
    end, waiting = time.monotonic() + launch.seconds, list(cases)
    while waiting and time.monotonic() < end:
        (folder / "cases.json").write_text(json.dumps(waiting))
        process = _start(launch, folder)
        before = len(waiting)
        try:
            while process.poll() is None and time.monotonic() < end:
                while waiting and len(_found(waiting[0], folder)) == launch.num_ranks:
                    yield waiting[0], _found(waiting.pop(0), folder)
                if waiting and _seconds_since(folder / f"{waiting[0]['name']}.begun") > launch.case_seconds:
                    break
                time.sleep(_POLL_SECONDS)
        finally:
            _end(process)
        while waiting and (folder / f"{waiting[0]['name']}.begun").exists():
            yield waiting[0], _found(waiting.pop(0), folder)
        if len(waiting) == before:
            break
    yield from ((case, []) for case in waiting)


def _seconds_since(begun: Path) -> float:
    return time.time() - begun.stat().st_mtime if begun.exists() else 0.0


def _start(launch: Launch, folder: Path) -> subprocess.Popen[bytes]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(launch.num_ranks)]
    words = [*torchrun, str(launch.script), *launch.words, "--role", "rank", "--folder", str(folder)]
    environment = os.environ | {"NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    # A group is given up by its ranks, so torch's own watch must not end them for it.
    environment["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    return subprocess.Popen([sys.executable, *words], env=environment)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for the launch, which ends its ranks when it is ended."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(timeout=_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _found(case: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob(f"{case['name']}-rank-*.json"))]


@contextlib.contextmanager
def joined(kind: str, *, cap_bytes: int | None = None, backend: str | None = None) -> Iterator[Rank]:
    """This process as one of a launch, its group there.

    Args:
        kind: `cuda` or `cpu`.
        cap_bytes: Most that torch's allocator may hold of the GPU; all of it if None.
        backend: How ranks talk; the device's own way if None. Over `gloo` ranks may share a GPU.
    """
    local, on_gpu = int(os.environ["LOCAL_RANK"]), kind == "cuda"
    local %= torch.cuda.device_count() if on_gpu else local + 1
    facts: dict[str, int] = {}
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    reader = DeviceReader(local) if on_gpu else None
    _note(facts, "before", reader)
    if on_gpu:
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
        _note(facts, "with_context", reader)
        if cap_bytes is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(cap_bytes / total, device)
    store, index, count = next(rendezvous("env://", timeout=_TIMEOUT))
    rank = Rank(index, count, device, store, reader, facts, backend or ("nccl" if on_gpu else "gloo"))
    _form_group(rank, "group")
    _note(facts, "with_communicator", reader)
    yield rank
    dist.destroy_process_group()


def _form_group(rank: Rank, name: str) -> int:
    """The ranks' group, its communicator there; bytes that are allocated all the same."""
    store = dist.PrefixStore(name, rank.store)
    dist.init_process_group(rank.backend, store=store, rank=rank.index, world_size=rank.count, timeout=_TIMEOUT)
    dist.all_reduce(torch.zeros(1, device=rank.device))
    return release()


def _renew_group(rank: Rank, name: str) -> None:
    """Another group in place of one whose collectives may wait for ever; the process ends where that does not work."""
    watch = threading.Timer(_PATIENCE_SECONDS, os._exit, (1,))
    watch.start()
    try:
        if rank.backend == "nccl":
            # Before anything waits for the GPU: what is under way there ends with the communicator alone.
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()
        left = _form_group(rank, f"group after {name}")
    except Exception as error:
        print(f"rank {rank.index}: no group after {name}: {type(error).__name__}: {error}", flush=True)
        os._exit(1)
    watch.cancel()
    rank.facts["groups_renewed"] = rank.facts.get("groups_renewed", 0) + 1
    if left > _LEFT_BYTES:
        print(f"rank {rank.index}: {left:,} B are left after {name}", flush=True)
        os._exit(1)


def _note(facts: dict[str, int], name: str, reader: DeviceReader | None) -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    memory = reader.read() if reader else None
    if memory is not None:
        facts[name] = memory.used_bytes


def release() -> int:
    """Give back all that can be given back; bytes that are allocated still."""
    gc.collect()
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def run_rank(rank: Rank, folder: Path, run: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Run the cases that are waiting, with another group after one that failed; leave the launch if there is none."""
    for case in json.loads((folder / "cases.json").read_text()):
        name, started = case["name"], time.monotonic()
        (folder / f"{name}.begun").touch()
        left = release()
        try:
            row = run(case)
        except torch.OutOfMemoryError as error:
            row = {"out_of_memory": " ".join(str(error).split())[:400]}
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
        row |= {"rank": rank.index, "left_bytes": left, "seconds": round(time.monotonic() - started, 2)}
        whole = folder / f"{name}-rank-{rank.index}.json"
        part = whole.with_suffix(".part")
        part.write_text(json.dumps(row))
        part.rename(whole)
        if not _all_are_through(rank, name, "failed" if ran_out(row) or "error" in row else "through"):
            # Another rank may be stuck in a collective that this one has left; in order there is no way out.
            rank.store.set(f"{name} over", "")
            os._exit(1)
        if any(rank.store.get(f"{name} {other}") != b"through" for other in range(rank.count)):
            _renew_group(rank, name)


def ran_out(row: dict[str, Any]) -> bool:
    """Whether a rank's memory did not suffice."""
    return "out_of_memory" in row or bool(row.get("figures", {}).get("out_of_memory"))


def _all_are_through(rank: Rank, name: str, how: str) -> bool:
    rank.store.set(f"{name} {rank.index}", how)
    keys, end = [f"{name} {other}" for other in range(rank.count)], time.monotonic() + _PATIENCE_SECONDS
    while not rank.store.check(keys):
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_SECONDS)
    # A rank whose peer is gone gets here when the peer has given up already.
    return not rank.store.check([f"{name} over"])


def measured(
    rank: Rank, request: StepRequest, choice: OptimizerChoice, *, num_steps: int, has_history: bool = True
) -> dict[str, Any]:
    """One rank's figures of a step: rank 0 the whole record, the others theirs, all the GPU's memory at the end.

    Args:
        rank: This process.
        request: The step.
        choice: The optimizer.
        num_steps: Steps in all.
        has_history: Whether the record has the step event by event.
    """
    record = measure(request, choice, device=rank.device, num_steps=num_steps)
    if not has_history:
        record = msgspec.structs.replace(record, history=None)
    row: dict[str, Any] = {"figures": msgspec.to_builtins(rank_row(rank.index, record)), "device": dict(rank.facts)}
    row["losses"] = record.losses
    if rank.index == 0:
        row["measurement"] = msgspec.to_builtins(record)
    if rank.reader is not None:
        row["device"]["reserved"] = torch.cuda.memory_reserved()
        _note(row["device"], "at_the_end", rank.reader)
    return row
