"""Train under FSDP2 with each optimizer, save, load on one GPU and go on; save losses and memory as JSON lines.

    python benchmarks/record_sharded.py --out FILE [--optimizers ID ...] [--ranks 2] [--steps 8] [--saved-after 4]

One row an optimizer: the losses of every step on the ranks, of the steps that one GPU took from their checkpoint in a
process of its own, and of one GPU from the start; each rank's bytes of state; each rank's peaks of the last step. The
ranks run under torchrun; `sharded_run.py` says what they train. With `--backend gloo` ranks may share a GPU, which NCCL
does not allow, or train on the CPU.

Needs torch, triton and optplan; where optplan is not installed, `python .ci/link_types.py` links this tree into
`.types`, to be named in PYTHONPATH.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast, which containers often forbid

import torch
from rank_cases import Launch, joined, run_cases, run_rank
from sharded_run import BATCH, BUILDERS, SEED, SIZES, Plan, set_deterministic, train_alone, train_sharded
from torch.distributed.device_mesh import init_device_mesh
from train_study_record import environment

SCHEMA = "optplan.sharded-training/1"


def main() -> int:
    """Start the ranks, then the process that goes on alone, and save what they found; 1 if an optimizer failed."""
    options = parse_arguments()
    if options.role == "rank":
        return run_rank_of(options)
    if options.role == "alone":
        return run_alone(options)
    with tempfile.TemporaryDirectory() as name:
        folder, cases = Path(name), [{"name": optimizer} for optimizer in options.optimizers]
        launch = Launch(Path(__file__), sys.argv[1:], options.ranks, options.seconds)
        ranks = {case["name"]: found for case, found in run_cases(cases, launch, folder)}
        start_alone(folder, options.seconds)
        failed = [not save_or_tell(options, plan_of(options, name), ranks[name], folder) for name in ranks]
    return int(any(failed))


def save_or_tell(options: argparse.Namespace, plan: Plan, ranks: list[dict[str, Any]], folder: Path) -> bool:
    """Save the row of an optimizer; whether there is one, all its processes having come through."""
    alone = folder / f"{plan.optimizer}-alone.json"
    if alone.exists() and sum("losses" in rank for rank in ranks) == options.ranks:
        save(options, row_of(options, plan, ranks, json.loads(alone.read_text())))
        return True
    errors = [f"rank {rank['rank']}: {rank.get('error') or rank.get('out_of_memory') or 'through'}" for rank in ranks]
    errors += [f"alone: {file.read_text()}" for file in folder.glob(f"{plan.optimizer}-alone.error")]
    print(plan.optimizer, "has no row;", "; ".join(errors) or "no rank told anything", flush=True)
    return False


def told(found: Callable[[], dict[str, Any]], place: Path) -> None:
    """Write what one optimizer's training found, or the error that ended it: the others go on."""
    try:
        place.with_suffix(".json").write_text(json.dumps(found()))
    except Exception as error:
        place.with_suffix(".error").write_text(f"{type(error).__name__}: {error}"[:400])


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train under FSDP2 and from its checkpoint on one GPU.")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines file to append to")
    parser.add_argument("--optimizers", nargs="+", choices=BUILDERS, default=list(BUILDERS), help="these alone")
    parser.add_argument("--size", choices=SIZES, default="300m", help="size of the model: parameters, about")
    parser.add_argument("--ranks", type=int, default=2, help="processes that shard the model, a GPU each")
    parser.add_argument("--steps", type=int, default=8, help="steps of a run")
    parser.add_argument("--saved-after", type=int, default=4, help="steps before the checkpoint")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where to train")
    parser.add_argument("--backend", choices=("nccl", "gloo"), default="nccl", help="how ranks talk")
    parser.add_argument(
        "--seconds", type=float, default=240.0, help="after which the ranks are ended, or the one alone"
    )
    parser.add_argument("--commit", default="", help="commit to record where the tree is no repository")
    parser.add_argument("--role", choices=("rank", "alone"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def plan_of(options: argparse.Namespace, optimizer: str) -> Plan:
    """The run of one optimizer."""
    return Plan(optimizer, options.size, options.steps, options.saved_after)


def start_alone(folder: Path, seconds: float) -> None:
    """Run this command again in one process, and wait for it; what it has found is in the folder, however it ends."""
    words = [__file__, *sys.argv[1:], "--role", "alone", "--folder", str(folder)]
    # As many threads as a rank has, or a CPU would add up in another order.
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, *words], env=environment, check=False, timeout=seconds)


def run_rank_of(options: argparse.Namespace) -> int:
    """All optimizers on one rank; one that fails does not keep the others from running."""
    set_deterministic()

    def run(case: dict[str, Any]) -> dict[str, Any]:
        mesh = init_device_mesh(options.device, (options.ranks,))
        return train_sharded(plan_of(options, case["name"]), rank.device, mesh, options.folder)

    with joined(options.device, backend=options.backend if options.device == "cuda" else None) as rank:
        run_rank(rank, options.folder, run)
    return 0


def run_alone(options: argparse.Namespace) -> int:
    """All optimizers in one process, from the ranks' checkpoints."""
    set_deterministic()
    for optimizer in options.optimizers:
        train = partial(train_alone, plan_of(options, optimizer), torch.device(options.device), options.folder)
        told(train, options.folder / f"{optimizer}-alone")
    return 0


def row_of(
    options: argparse.Namespace, plan: Plan, ranks: list[dict[str, Any]], alone: dict[str, Any]
) -> dict[str, Any]:
    """The row of one optimizer, from what the processes found."""
    return {
        "schema": SCHEMA, "optimizer": plan.optimizer, "sharding": "fsdp2", "ranks": options.ranks,
        "device": options.device, "num_gpus": torch.cuda.device_count(), "backend": options.backend,
        "dtype": "bfloat16",
        "model": {**SIZES[plan.size]._asdict(), "shapes": ranks[0]["shapes"]}, "batch": BATCH, "seed": SEED,
        "num_steps": plan.num_steps, "saved_after": plan.saved_after,
        "losses": [rank["losses"] for rank in ranks], "resumed_on_one_losses": alone["resumed_losses"],
        "one_gpu_losses": alone["losses"],
        "state_bytes": [rank["state_bytes"] for rank in ranks], "one_gpu_state_bytes": alone["state_bytes"],
        "peaks": [rank["peaks"] for rank in ranks], "one_gpu_peaks": alone["peaks"],
    }  # fmt: skip


def save(options: argparse.Namespace, row: dict[str, Any]) -> None:
    """Append the row with its environment, and print its losses."""
    words = [Path(word).name for word in sys.argv[1:]]
    where = environment(options.commit) | {"command": " ".join(["python", "benchmarks/record_sharded.py", *words])}
    with options.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**row, "environment": where}, separators=(",", ":")) + "\n")
    print(
        row["optimizer"], "ranks", row["losses"][0][-1], "resumed on one", row["resumed_on_one_losses"][-1], flush=True
    )
    print("   from the start on one", row["one_gpu_losses"][-1], "state", row["state_bytes"], flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
