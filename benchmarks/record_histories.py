"""Record what torch's CUDA caching allocator does on a real GPU, event by event.

    python benchmarks/record_histories.py --out DIRECTORY [--only NAME ...] [--workers 8]

Each case runs in a process of its own under its own `PYTORCH_CUDA_ALLOC_CONF` and is saved as `NAME.json.gz`: the
snapshot with the whole history, as `torch.cuda.memory._snapshot()` returns it, and

* `pattern` cases: a list of operations drawn from a fixed seed (allocate, free, empty the cache, hand a tensor to
  another stream), and after every single one the address returned and every counter of `torch.cuda.memory_stats()`
  that changed;
* `training` cases: three steps of a small transformer, with the counters and peaks at the end.

Cases marked `alone` fill the whole device and run one at a time. Needs torch; nothing of optplan is imported.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

KIB, MIB = 2**10, 2**20
COUNTERS = (
    "allocated_bytes", "requested_bytes", "active_bytes", "reserved_bytes", "inactive_split_bytes",
    "allocation", "active", "segment", "inactive_split",
)  # fmt: skip
TOTALS = ("num_alloc_retries", "num_ooms")
SLEEP_CYCLES = 60_000_000
"""About 30 ms: what a sleeping stream has used stays in use for the operations that follow."""


class Case(NamedTuple):
    """One history: the allocator's settings, the share of the device it may take, and what is run."""

    conf: str = ""
    fraction: float | None = None
    num_operations: int = 700
    largest_bytes: int = 96 * MIB
    live_bytes: int = 900 * MIB
    num_streams: int = 1
    alone: bool = False
    training: bool = False


CASES = {
    "plain": Case(),
    "plain_small": Case(largest_bytes=3 * MIB, live_bytes=60 * MIB, num_operations=1200),
    "roundup_number": Case("roundup_power2_divisions:4"),
    "roundup_list": Case("roundup_power2_divisions:[2:8,16:2,32:1,>:4]"),
    "max_split": Case("max_split_size_mb:24"),
    "max_split_full": Case("max_split_size_mb:32,max_non_split_rounding_mb:48", fraction=0.007, num_operations=900),
    "garbage_collection": Case("garbage_collection_threshold:0.6", fraction=0.009, num_operations=900),
    "garbage_collection_streams": Case(
        "garbage_collection_threshold:0.5,max_split_size_mb:64", fraction=0.009, num_streams=2, num_operations=900
    ),
    "full": Case(fraction=0.006, num_operations=900),
    "expandable": Case("expandable_segments:True"),
    "expandable_full": Case("expandable_segments:True", fraction=0.006, num_operations=900),
    "expandable_roundup": Case("expandable_segments:True,roundup_power2_divisions:8"),
    "streams": Case(num_streams=3, num_operations=900),
    "streams_full": Case(num_streams=2, fraction=0.007, num_operations=900),
    "streams_expandable": Case("expandable_segments:True", num_streams=3, num_operations=900),
    "large_segments": Case("large_segment_size_mb:40"),
    "device_full": Case(num_operations=300, largest_bytes=40_000 * MIB, live_bytes=200_000 * MIB, alone=True),
    "device_full_expandable": Case(
        "expandable_segments:True", num_operations=300, largest_bytes=40_000 * MIB, live_bytes=200_000 * MIB, alone=True
    ),
    "training": Case(training=True),
    "training_expandable": Case("expandable_segments:True", training=True),
    "training_full": Case("max_split_size_mb:64", fraction=0.0042, training=True),
}


def draw_operations(name: str, case: Case) -> list[list[Any]]:
    """The operations of a pattern, the same for every run.

    Returns:
        `["alloc", slot, num_bytes, stream]`, `["free", slot]`, `["use", slot, stream]` (the tensor is used on another
        stream too, which sleeps when the tensor is freed), `["sync"]` or `["empty"]`.
    """
    draw = random.Random(name)
    usual = [_draw_size(draw, case.largest_bytes) for _ in range(12)]
    live: dict[int, int] = {}
    operations: list[list[Any]] = []
    for slot in range(case.num_operations):
        if draw.random() < 0.008:
            operations.append(["empty"])
        num_bytes = draw.choice(usual) if draw.random() < 0.5 else _draw_size(draw, case.largest_bytes)
        operations.append(["alloc", slot, num_bytes, draw.randrange(case.num_streams)])
        live[slot] = num_bytes
        if case.num_streams > 1 and draw.random() < 0.05:
            operations.append(["use", slot, draw.randrange(case.num_streams)])
        while live and (sum(live.values()) > case.live_bytes or draw.random() < 0.42):
            gone = draw.choice(sorted(live)[-6:] if draw.random() < 0.5 else sorted(live))
            del live[gone]
            operations.append(["free", gone])
        if case.num_streams > 1 and draw.random() < 0.06:
            operations.append(["sync"])
        if draw.random() < 0.004:
            operations += [["free", gone] for gone in draw.sample(sorted(live), len(live))]
            live.clear()
    return operations


def _draw_size(draw: random.Random, largest_bytes: int) -> int:
    """A size between 1 byte and the largest, each power of two as likely as the next, some of them round."""
    size = int(2 ** draw.uniform(0 if draw.random() < 0.15 else 14, (largest_bytes - 1).bit_length()))
    size = max(1, min(size, largest_bytes))
    return -(-size // MIB) * MIB if size > MIB and draw.random() < 0.25 else size


def record_pattern(name: str, case: Case) -> dict[str, Any]:
    """Run a pattern: its operations, and after each the address (0 if none) and the counters that changed."""
    import torch

    operations = draw_operations(name, case)
    streams = [torch.cuda.default_stream(), *(torch.cuda.Stream() for _ in range(case.num_streams - 1))]
    tensors: dict[int, torch.Tensor] = {}
    users: dict[int, Any] = {}
    known: dict[str, int] = {}
    addresses, changes = [], []
    for operation in operations:
        addresses.append(_run(operation, tensors, users, streams))
        now = read_counters()
        changes.append({key: value for key, value in now.items() if known.get(key, 0) != value})
        known = now
    return {
        "streams": [stream.cuda_stream for stream in streams],
        "operations": operations,
        "addresses": addresses,
        "changes": changes,
    }


def _run(operation: list[Any], tensors: dict[int, Any], users: dict[int, Any], streams: list[Any]) -> int:
    import torch

    kind, *rest = operation
    if kind == "alloc":
        slot, num_bytes, stream = rest
        with torch.cuda.stream(streams[stream]):
            try:
                tensors[slot] = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
            except torch.OutOfMemoryError:
                return 0
        return int(tensors[slot].data_ptr())
    if kind == "free":
        if rest[0] in users:
            with torch.cuda.stream(users[rest[0]]):
                torch.cuda._sleep(SLEEP_CYCLES)
        tensors.pop(rest[0], None)
    elif kind == "use" and rest[0] in tensors:
        users[rest[0]] = streams[rest[1]]
        tensors[rest[0]].record_stream(streams[rest[1]])
    elif kind == "sync":
        torch.cuda.synchronize()
    elif kind == "empty":
        torch.cuda.empty_cache()
    return 0


def read_counters() -> dict[str, int]:
    """Current values by pool (`allocated_bytes.small_pool`) and the totals."""
    import torch

    stats = torch.cuda.memory_stats()
    counters = {
        f"{key}.{pool}": stats[f"{key}.{pool}.current"] for key in COUNTERS for pool in ("small_pool", "large_pool")
    }
    return counters | {key: stats[key] for key in TOTALS}


def record_training() -> dict[str, Any]:
    """Three steps of a small transformer with AdamW; ends early where memory does."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.1, batch_first=True, norm_first=True)
    model = nn.Sequential(
        nn.Embedding(16_000, 512), nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), nn.Linear(512, 16_000)
    ).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(0, 16_000, (4, 300), device="cuda")
    num_steps = 0
    try:
        for _ in range(3):
            logits = model(tokens)
            nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
            del logits
            optimizer.step()
            optimizer.zero_grad()
            num_steps += 1
    except torch.OutOfMemoryError:
        pass
    torch.cuda.synchronize()
    return {"num_steps": num_steps}


def record_case(name: str) -> dict[str, Any]:
    """Everything one case leaves; runs in a process of its own."""
    import torch

    case = CASES[name]
    torch.cuda.init()
    if case.fraction is not None:
        torch.cuda.set_per_process_memory_fraction(case.fraction)
    torch.cuda.memory._record_memory_history("all", context=None, stacks="python", max_entries=10**6)
    torch.cuda.reset_peak_memory_stats()
    recorded = record_training() if case.training else record_pattern(name, case)
    stats = {key: value for key, value in torch.cuda.memory_stats().items() if isinstance(value, int)}
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    return {
        "schema": "optplan.history/1",
        "name": name,
        "alloc_conf": case.conf,
        "memory_fraction": case.fraction,
        "total_bytes": total_bytes,
        "allowed_bytes": None if case.fraction is None else int(case.fraction * total_bytes),
        "environment": environment(),
        **recorded,
        "final_stats": stats,
        "snapshot": torch.cuda.memory._snapshot(),
    }


def environment() -> dict[str, str]:
    """Where and with what the history was recorded."""
    import torch

    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpu, driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")
    return {
        "gpu": gpu,
        "driver": driver,
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": "python benchmarks/record_histories.py --out DIRECTORY",
    }


def save_case(name: str, directory: Path) -> None:
    """Record a case in this process and write it."""
    text = json.dumps(record_case(name), separators=(",", ":"))
    (directory / f"{name}.json.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def start_case(name: str, directory: Path) -> str | None:
    """Record a case in a new process; the end of its error output if it fails."""
    command = [sys.executable, __file__, "--out", str(directory), "--case", name]
    variables = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": CASES[name].conf}
    if not CASES[name].conf:
        del variables["PYTORCH_CUDA_ALLOC_CONF"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)
    return None if done.returncode == 0 else done.stderr.strip()[-600:]


def main() -> int:
    """Record the cases asked for; the number that failed decides the exit status."""
    parser = argparse.ArgumentParser(description="Record allocator histories on a CUDA GPU.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    parser.add_argument("--only", nargs="*", help="these cases alone")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=8, help="cases recorded at the same time")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.case is not None:
        save_case(options.case, options.out)
        return 0
    names = [name for name in CASES if options.only is None or name in options.only]
    num_failed = 0
    for alone, workers in ((False, options.workers), (True, 1)):
        chosen = [name for name in names if CASES[name].alone is alone]
        with ThreadPoolExecutor(workers) as pool:
            for name, error in zip(chosen, pool.map(lambda name: start_case(name, options.out), chosen), strict=True):
                num_failed += error is not None
                print(name, "recorded" if error is None else f"failed: {error}", flush=True)
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
