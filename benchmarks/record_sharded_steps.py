"""Measure whole training steps of two GPUs, rank by rank, and save them as JSON lines.

    python benchmarks/record_sharded_steps.py --out FILE [--only NAME ...] [--predict]

The cases of `sharded_step_cases.toml` run one after another in one launch, each on an empty allocator; a case that
fails is saved with its error and does not keep the others from running. `rank_cases.py` says how. A row has the whole
record of rank 0, every rank's figures, and the GPU's used memory before torch was there, with the context, with the
communicator and at the end, so that the communication library's own memory shows. With `--predict` both engines'
figures are added, which takes no GPU. With `--device cpu` ranks train on the CPU over gloo, where torch has no
allocator figures.

Needs torch, transformers, triton and optplan.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from rank_cases import Launch, joined, measured, run_cases, run_rank
from train_study_record import environment

SCHEMA = "optplan.sharded-step/1"
CASES_FILE = Path(__file__).parent / "sharded_step_cases.toml"


def main() -> int:
    """Run the cases, save their rows; 1 if one failed."""
    options = parse_arguments()
    if options.role == "rank":
        with joined(options.device) as rank:
            run_rank(rank, options.folder, lambda case: measured(rank, *asked(case, options), num_steps=options.steps))
        return 0
    cases = read_cases(options)
    num_failed = 0
    with tempfile.TemporaryDirectory() as name:
        launch = Launch(Path(__file__), sys.argv[1:], options.ranks, options.seconds)
        for case, ranks in run_cases(cases, launch, Path(name)):
            row = row_of(case, ranks, options)
            save(row, options)
            num_failed += "error" in row
    return int(num_failed > 0)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure steps that several GPUs take together.")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines file to append to")
    parser.add_argument("--cases", type=Path, default=CASES_FILE, help="the cases")
    parser.add_argument("--only", nargs="+", help="these cases alone, by name")
    parser.add_argument("--ranks", type=int, default=2, help="processes, a GPU each")
    parser.add_argument("--steps", type=int, default=6, help="steps of a case: the third is recorded")
    parser.add_argument("--seconds", type=float, default=420.0, help="after which what runs is ended")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where to train")
    parser.add_argument("--predict", action="store_true", help="add what both engines predict")
    parser.add_argument("--commit", default="", help="commit to record where the tree is no repository")
    parser.add_argument("--role", choices=("rank",), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def read_cases(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The cases asked for."""
    cases: list[dict[str, Any]] = tomllib.loads(options.cases.read_text(encoding="utf-8"))["case"]
    return [case for case in cases if options.only is None or case["name"] in options.only]


def asked(case: dict[str, Any], options: argparse.Namespace, *, engine: str = "rules") -> tuple[Any, Any]:
    """The request and the optimizer of a case."""
    from optplan.planner.candidates import choose_optimizers
    from optplan.planner.catalog import load_model
    from optplan.planner.request import check_request

    request = check_request(
        load_model(case["model"]), gpu="h200", gpus=options.ranks, nodes=1, engine=engine, **case["step"]
    )
    (choice,) = choose_optimizers(case.get("optimizer", "adamw"), case.get("options"))
    return request, choice


def row_of(case: dict[str, Any], ranks: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """A case with what every rank found and what is predicted."""
    row: dict[str, Any] = {"schema": SCHEMA, "case": case, "ranks": ranks}
    failed = [f"rank {rank['rank']}: {text}" for rank in ranks if (text := why_failed(rank))]
    if failed or len(ranks) < options.ranks:
        row["error"] = failed[0] if failed else f"{len(ranks)} of {options.ranks} ranks told anything"
    elif options.predict:
        row["predicted"] = {engine: predicted(case, options, engine=engine) for engine in ("rules", "trace")}
    return row


def why_failed(rank: dict[str, Any]) -> str:
    """What kept a rank from a whole step, nothing if it took one."""
    if "figures" not in rank:
        return str(rank.get("error") or rank.get("out_of_memory"))
    failure = rank["figures"]["out_of_memory"]
    return f"out of memory in {failure['phase']}: {failure['message']}" if failure else ""


def predicted(case: dict[str, Any], options: argparse.Namespace, *, engine: str) -> dict[str, Any]:
    """Peaks of the case by phase, what is alive at the largest, what is reserved."""
    request, choice = asked(case, options, engine=engine)
    workload = workload_of(request, engine)
    (candidate,), _ = workload.candidates([choice])
    peaks = workload.peaks(candidate)
    assert peaks is not None
    return {
        "phases": {phase: peak.peak_allocated_bytes for phase, peak in peaks.phases.items()},
        "categories": peaks.categories,
        "reserved_bytes": peaks.reserved_bytes,
    }


def workload_of(request: Any, engine: str) -> Any:
    """What answers a request by this engine."""
    if engine == "rules":
        from optplan.planner.workload import Workload

        return Workload(request)
    from optplan.profilers.estimation import TracedWorkload
    from optplan.profilers.workloads.source import CatalogueSource

    return TracedWorkload(request, CatalogueSource(request.model), searches=False)


def save(row: dict[str, Any], options: argparse.Namespace) -> None:
    """Append a row with its environment, and print its figures."""
    words = [Path(word).name for word in sys.argv[1:]]
    where = environment(options.commit) | {
        "command": " ".join(["python", "benchmarks/record_sharded_steps.py", *words])
    }
    with options.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**row, "environment": where}, separators=(",", ":")) + "\n")
    print(f"{row['case']['name']:40} {verdict(row)}", flush=True)


def verdict(row: dict[str, Any]) -> str:
    """The peak and the losses of rank 0, and how far the engines are from the peak."""
    if "error" in row:
        return str(row["error"])
    first = row["ranks"][0]
    peak = first["figures"]["peak_allocated_bytes"]
    text = f"losses {first['losses'][0]:.4f} to {first['losses'][-1]:.4f} in {first['seconds']} s"
    if peak is None:
        return text
    errors = {name: max(found["phases"].values()) / peak - 1 for name, found in row.get("predicted", {}).items()}
    return f"peak {peak:,} B, {text}" + "".join(f", {name} {error:+.3%}" for name, error in errors.items())


if __name__ == "__main__":
    raise SystemExit(main())
