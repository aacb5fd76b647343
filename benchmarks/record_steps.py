"""Measure the memory of real training steps on a CUDA GPU and save the figures as JSON lines.

    python benchmarks/record_steps.py --out FILE [--set hold-out] [--only MODEL] [--workers 1] [--known FILE ...]
    python benchmarks/record_steps.py --out FILE --set operations --events FILE.jsonl.gz [--labels]

Each case of `step_cases.toml` runs in a process of its own: the transformers model is built on the CPU without
initialising it, moved to the GPU, and trained for three steps on random tokens with `labels = input_ids`, or on random
images. The peak counter of allocated bytes is reset before each phase of a step: forward, backward, clip, step, zero.
With gradient accumulation, forward and backward are those of the last micro-step. `step_training.py` says how a case
builds its model and takes its step.

With `--events`, forward and backward of the third step are also saved allocation by allocation: bytes requested, and
the same negative where an allocation ends. With `--labels`, what made each allocation is added. Needs torch and
transformers; of optplan the chunked loss alone is imported.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import gzip
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_SYMBOLIZE_MODE", "dladdr")

import torch
import transformers
from step_training import Step, build_model

CASES_FILE = Path(__file__).parent / "step_cases.toml"
DEFAULTS = {
    "precision": "bf16",
    "optimizer": "adamw",
    "batch": 1,
    "checkpointing": False,
    "attention": "sdpa",
    "grad_accum": 1,
}
PHASES = ("forward", "backward", "clip", "step", "zero")
NUM_STEPS = 3
_OPERATION = re.compile(r"at::_ops::(\w+?)::")
_NODE = re.compile(r"(\w+Backward\w*|AccumulateGrad)::apply")
_NATIVE = re.compile(r"at::native::(?:\(anonymous namespace\)::)?(\w+)")
_CUBLAS = re.compile(r"(\w*(?:[cC]u[bB]las|cudnn)\w*)")


def read_cases(set_name: str, only: str | None) -> list[dict[str, Any]]:
    """The cases of one set with the defaults and the models' configurations filled in."""
    models = tomllib.loads(CASES_FILE.read_text())["models"]
    cases = [DEFAULTS | case for case in read_sets()[set_name]["cases"] if only in (None, case["model"])]
    return [case | {"config": models[case["model"]]} for case in cases]


def read_sets() -> dict[str, Any]:
    """All sets of cases by name."""
    sets: dict[str, Any] = tomllib.loads(CASES_FILE.read_text())["sets"]
    return sets


def without_known(cases: list[dict[str, Any]], paths: list[Path]) -> list[dict[str, Any]]:
    """The cases of which no file has a row without an error."""
    fields = {name for table in read_sets().values() for case in table["cases"] for name in case} | DEFAULTS.keys()
    known = {
        identity(row, fields)
        for path in paths
        if path.exists()
        for row in rows_of(path)
        if "error" not in row and "model" in row
    }
    return [case for case in cases if identity(case, fields) not in known]


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, compressed or not."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        yield from map(json.loads, file)


def identity(case: dict[str, Any], fields: set[str]) -> str:
    """What tells a case from all others, in a row with its figures too."""
    return json.dumps({name: case[name] for name in sorted(fields & case.keys())})


def measure(case: dict[str, Any], *, history: str | None) -> dict[str, Any]:
    """All figures of one case; `history` is `sizes` or `labels` to record the allocations of the last step."""
    model = build_model(case)
    row: dict[str, Any] = {"params": sum(p.numel() for p in model.parameters())}
    row["alloc_model"] = torch.cuda.memory_allocated()
    step = Step(case, model)
    row["steps"] = [step.run() for _ in range(NUM_STEPS - 1)]
    if history is not None:
        gc.collect()
        context = "all" if history == "labels" else None
        torch.cuda.memory._record_memory_history("all", context=context, stacks="all", max_entries=10**6)
    row["steps"].append(step.run())
    if history is not None:
        row["events"] = read_events(step.starts_us)
        torch.cuda.memory._record_memory_history(None)
    row["peak"] = max(phase["peak"] for phase in row["steps"][-1].values())
    row["reserved"] = max(phase["res_peak"] for steps in row["steps"] for phase in steps.values())
    row["state"] = step.state_bytes
    row["num_alloc_retries"] = torch.cuda.memory_stats()["num_alloc_retries"]
    return row


def read_events(starts_us: dict[str, int]) -> dict[str, list[Any]]:
    """Forward and backward as signed sizes in the order in which they happened, and what made each allocation."""
    sizes: dict[int, int] = {}
    result: dict[str, list[Any]] = {"forward": [], "backward": [], "labels": []}
    for entry in torch.cuda.memory._snapshot()["device_traces"][0]:
        begun = [name for name in starts_us if entry["time_us"] >= starts_us[name]]
        phase = max(begun, key=PHASES.index, default=None)
        if entry["action"] == "alloc":
            sizes[entry["addr"]] = entry["size"]
            change = entry["size"]
        elif entry["action"] == "free_completed" and entry["addr"] in sizes:
            change = -sizes.pop(entry["addr"])
        else:
            continue
        if phase in ("forward", "backward", "clip"):
            result.setdefault(phase, []).append(change)
            if change >= 0:
                result["labels"].append(describe(entry.get("frames", [])))
    return result


def describe(frames: list[dict[str, Any]]) -> str:
    """What made an allocation: kernels, operations and autograd nodes, innermost first, then the model's own line."""
    found: list[str] = []
    for frame in frames:
        name, file = frame["name"], frame["filename"]
        if file.endswith(".py"):
            if "/torch/" in file or file.endswith("record_steps.py"):
                continue
            found.append(f"{Path(file).name}:{frame['line']}:{name}")
            if len([part for part in found if ".py" in part]) == 3:
                break
            continue
        for pattern, prefix in ((_CUBLAS, "lib"), (_NODE, "node"), (_OPERATION, "op"), (_NATIVE, "native")):
            match = pattern.search(name)
            if match:
                part = f"{prefix}:{match.group(1)}"
                if part not in found and len(found) < 8:
                    found.append(part)
                break
    return " < ".join(found)


def environment() -> dict[str, str]:
    """Where and with what the figures were measured."""
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    gpu, driver_version = driver.stdout.splitlines()[0].split(", ")
    return {
        "gpu": gpu,
        "driver": driver_version,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["python", "benchmarks/record_steps.py", *(Path(word).name for word in sys.argv[1:])]),
        **given_facts(),
    }


def given_facts() -> dict[str, str]:
    """What whoever started this command wants its records to say: the commit, the circumstances."""
    variables = {"commit": "OPTPLAN_COMMIT", "note": "OPTPLAN_RECORD_NOTE"}
    return {name: os.environ[variable] for name, variable in variables.items() if os.environ.get(variable)}


def attempt(arguments: tuple[dict[str, Any], str | None]) -> dict[str, Any]:
    """The case with its figures, or with the error that ended it."""
    case, history = arguments
    started = time.time()
    try:
        result = measure(case, history=history)
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}"[:600]}
    return {**case, **result, "seconds": round(time.time() - started, 1)}


def run_cases(cases: list[dict[str, Any]], *, workers: int, history: str | None) -> Iterator[dict[str, Any]]:
    """Every case measured, `workers` at a time; those that ran out of memory again, one at a time."""
    context = multiprocessing.get_context("fork")
    for num_workers in (workers, 1):
        failed = []
        with context.Pool(num_workers, maxtasksperchild=1) as pool:
            jobs = [(case, history) for case in cases]
            for case, row in zip(cases, pool.imap(attempt, jobs), strict=True):
                crowded = "OutOfMemory" in row.get("error", "") or row.get("num_alloc_retries", 0) > 0
                if crowded and num_workers > 1:
                    failed.append(case)
                else:
                    yield row
        cases = failed


def save_rows(rows: Iterator[dict[str, Any]], path: Path, events: list[dict[str, Any]]) -> int:
    """Append each row to the file as it comes, with its events to `events`; returns the number of failed cases."""
    where, num_errors = environment(), 0
    with path.open("a") as out:
        for row in rows:
            recorded = row.pop("events", None)
            if recorded is not None:
                peaks = {name: row["steps"][-1][name] for name in ("forward", "backward")}
                kept = {name: value for name, value in row.items() if name not in ("steps", "seconds")}
                events.append({**kept, "peaks": peaks, **recorded})
            num_errors += "error" in row
            out.write(json.dumps({**row, "environment": where}) + "\n")
            out.flush()
            print(row["model"], row["precision"], row.get("peak", row.get("error")), row["seconds"], flush=True)
    return num_errors


def write_events(path: Path, events: list[dict[str, Any]], *, with_labels: bool) -> None:
    """Save the cases' events as gzipped JSON lines."""
    dropped = () if with_labels else ("labels",)
    rows = [{name: value for name, value in row.items() if name not in dropped} for row in events]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0))


def main() -> int:
    """Measure the cases of the command line and save them."""
    parser = argparse.ArgumentParser(description="Measure the memory of real training steps.")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines file to append to")
    parser.add_argument("--set", default="hold-out", help="set of cases in step_cases.toml")
    parser.add_argument("--only", help="cases of this model alone")
    parser.add_argument("--events", type=Path, help="gzipped JSON lines file for every allocation of the third step")
    parser.add_argument("--labels", action="store_true", help="say with each event what made the allocation")
    parser.add_argument("--workers", type=int, default=1, help="cases measured at the same time")
    parser.add_argument("--known", type=Path, nargs="+", default=[], help="leave out what these files have a row of")
    options = parser.parse_args()
    cases = without_known(read_cases(options.set, options.only), options.known)
    history = None if options.events is None else "labels" if options.labels else "sizes"
    rows = run_cases(cases, workers=options.workers, history=history)
    events: list[dict[str, Any]] = []
    try:
        num_errors = save_rows(rows, options.out, events)
    finally:
        if options.events is not None:
            write_events(options.events, events, with_labels=options.labels)
    return 1 if num_errors else 0


if __name__ == "__main__":
    sys.exit(main())
