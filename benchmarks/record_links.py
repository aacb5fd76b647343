"""Time collectives between the GPUs of one machine by size, and append them as JSON lines.

    python benchmarks/record_links.py --out benchmarks/records/h200x2_links.jsonl [--ranks 2] [--most-bytes 1073741824]

One row a collective and size: all-gather, reduce-scatter and all-reduce of 1 MiB to 1 GiB in bf16, the median of the
calls and their spread. `fit_step_time.py --write` takes the rates of sharded training from these rows. The ranks run
under torchrun, a GPU each; with `--device cpu` they talk through gloo, which says nothing of links and is for trying.

Needs torch and optplan; where optplan is not installed, `python .ci/link_types.py` links this tree into `.types`, to be
named in PYTHONPATH.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from link_records import SCHEMA, bus_bytes_per_s

from optplan.planner.gpus import find_gpu

COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce")
LEAST_BYTES = 2**20
WARM_UP = 5


def main() -> int:
    """Start the ranks, or be one of them."""
    options = parse_arguments()
    if "LOCAL_RANK" in os.environ:
        return run_rank(options)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
    return subprocess.run([sys.executable, *torchrun, __file__, *sys.argv[1:]], check=False).returncode


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Time collectives between GPUs by size.")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines file to append to")
    parser.add_argument("--ranks", type=int, default=2, help="processes, a GPU each")
    parser.add_argument("--most-bytes", type=int, default=2**30, help="the largest tensor, gathered")
    parser.add_argument("--calls", type=int, default=20, help="timed calls of each")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where the tensors are")
    parser.add_argument("--commit", default="", help="commit to record where the tree is no repository")
    return parser.parse_args()


def run_rank(options: argparse.Namespace) -> int:
    """All collectives and sizes on one rank; the first writes them."""
    rank, on_gpu = int(os.environ["LOCAL_RANK"]), options.device == "cuda"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rows = []
    for collective in COLLECTIVES:
        num_bytes = LEAST_BYTES
        while num_bytes <= options.most_bytes:
            seconds = timed(call_of(collective, num_bytes, device), options.calls, device)
            rows.append({"collective": collective, "num_bytes": num_bytes, "seconds": spread(seconds)})
            num_bytes *= 4
    if rank == 0:
        save(options, rows)
    dist.destroy_process_group()
    return 0


def call_of(collective: str, num_bytes: int, device: torch.device) -> Callable[[], Any]:
    """One call of a collective whose whole tensor, before it is reduced or after it is gathered, has so many bytes."""
    ranks = dist.get_world_size()
    whole = torch.zeros(num_bytes // 2 // ranks * ranks, dtype=torch.bfloat16, device=device)
    part = torch.zeros(whole.numel() // ranks, dtype=torch.bfloat16, device=device)
    if collective == "all_gather":
        return lambda: dist.all_gather_into_tensor(whole, part)
    if collective == "reduce_scatter":
        return lambda: dist.reduce_scatter_tensor(part, whole)
    return lambda: dist.all_reduce(whole)


def timed(call: Callable[[], Any], count: int, device: torch.device) -> list[float]:
    """Seconds of each call, after a few that are not timed; the ranks begin each together."""
    found = []
    for index in range(WARM_UP + count):
        dist.barrier()
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        if index >= WARM_UP:
            found.append(time.perf_counter() - start)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, and the fifths at both ends."""
    ordered = sorted(seconds)
    return {f"p{share}": ordered[min(len(ordered) - 1, len(ordered) * share // 100)] for share in (20, 50, 80)}


def save(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Append the rows with their environment, and print what passed through a link."""
    shared = {"schema": SCHEMA, "ranks": dist.get_world_size(), "backend": dist.get_backend(), "dtype": "bfloat16"}
    shared |= {"gpu": gpu_id(options.device), "environment": environment(options)}
    with options.out.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(shared | row) + "\n")
            rate = bus_bytes_per_s(shared | row)
            print(f"{row['collective']:15} {row['num_bytes'] / 2**20:7.0f} MiB  {rate / 1e9:7.1f} GB/s", flush=True)


def gpu_id(device: str) -> str | None:
    """Id of the GPU in the catalogue, None on the CPU."""
    if device == "cpu":
        return None
    properties = torch.cuda.get_device_properties(0)
    return find_gpu(properties.name, properties.total_memory).id


def environment(options: argparse.Namespace) -> dict[str, str]:
    """Where and with what the collectives were timed."""
    words = [Path(word).name for word in sys.argv[1:]]
    on_gpu = options.device == "cuda"
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else "none",
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else "none",
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["python", "benchmarks/record_links.py", *words]),
        "commit": options.commit or _head(),
    }


def _head() -> str:
    command = ["git", "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    raise SystemExit(main())
