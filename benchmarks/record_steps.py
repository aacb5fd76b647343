"""Measure the memory of real training steps on a CUDA GPU and save the figures as JSON lines.

    python benchmarks/record_steps.py --out FILE [--set hold-out] [--only MODEL] [--workers 1]
    python benchmarks/record_steps.py --out FILE --set operations --events FILE.jsonl.gz [--labels]

Each case of `step_cases.toml` runs in a process of its own: the transformers model is built on the CPU without
initialising it, moved to the GPU, and trained for three steps on random tokens with `labels = input_ids`. The peak
counter of allocated bytes is reset before each phase of a step: forward, backward, step, zero. With gradient
accumulation, forward and backward are those of the last micro-step.

With `--events`, forward and backward of the third step are also saved allocation by allocation: bytes requested, and
the same negative where an allocation ends. With `--labels`, what made each allocation is added. Needs torch and
transformers; nothing of optplan is imported.
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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_SYMBOLIZE_MODE", "dladdr")

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

CASES_FILE = Path(__file__).parent / "step_cases.toml"
DEFAULTS = {
    "precision": "bf16",
    "optimizer": "adamw",
    "batch": 1,
    "checkpointing": False,
    "attention": "sdpa",
    "grad_accum": 1,
}
PHASES = ("forward", "backward", "step", "zero")
NUM_STEPS = 3
_OPERATION = re.compile(r"at::_ops::(\w+?)::")
_NODE = re.compile(r"(\w+Backward\w*|AccumulateGrad)::apply")
_NATIVE = re.compile(r"at::native::(?:\(anonymous namespace\)::)?(\w+)")
_CUBLAS = re.compile(r"(\w*(?:[cC]u[bB]las|cudnn)\w*)")


def read_cases(set_name: str, only: str | None) -> list[dict[str, Any]]:
    """The cases of one set with the defaults and the models' configurations filled in."""
    tables = tomllib.loads(CASES_FILE.read_text())
    cases = [DEFAULTS | case for case in tables["sets"][set_name]["cases"] if only in (None, case["model"])]
    return [case | {"config": tables["models"][case["model"]]} for case in cases]


def build_model(case: dict[str, Any]) -> torch.nn.Module:
    """The case's model on the GPU, parameters placed one by one as `module.to("cuda")` does."""
    fields = dict(case["config"])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields, use_cache=False)
    dtype = torch.bfloat16 if case["precision"] == "bf16" else torch.float32
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, attn_implementation=case["attention"], dtype=dtype)
    model.tie_weights()
    model.to("cuda")
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    if case["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def build_optimizer(case: dict[str, Any], model: torch.nn.Module) -> torch.optim.Optimizer:
    """The case's optimizer."""
    if case["optimizer"] == "sgd":
        return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    return torch.optim.AdamW(
        model.parameters(), lr=1e-4, **{"adamw": {"fused": True}, "adamw_foreach": {"foreach": True}}[case["optimizer"]]
    )


def memory_now() -> dict[str, int]:
    """Peaks since the last reset and the current allocated bytes."""
    stats = torch.cuda.memory_stats()
    return {
        "peak": stats["allocated_bytes.all.peak"],
        "cur": stats["allocated_bytes.all.current"],
        "req_peak": stats["requested_bytes.all.peak"],
        "res_peak": stats["reserved_bytes.all.peak"],
    }


class Step:
    """Runs training steps, measuring each phase."""

    def __init__(self, case: dict[str, Any], model: torch.nn.Module) -> None:
        self.case = case
        self.model = model
        self.optimizer = build_optimizer(case, model)
        self.tokens = torch.randint(0, model.config.vocab_size, (case["batch"], case["seq"]), device="cuda")
        self.phases: dict[str, dict[str, int]] = {}
        self.starts_us: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the body as the phase `name`; a later phase of the same name replaces it."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        time.sleep(0.002)
        self.starts_us[name] = time.time_ns() // 1000
        time.sleep(0.002)
        yield
        torch.cuda.synchronize()
        self.phases[name] = memory_now()

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the forward pass runs."""
        return torch.autocast("cuda", torch.bfloat16) if self.case["precision"] == "amp" else nullcontext()

    def run(self) -> dict[str, dict[str, int]]:
        """One step; its phases."""
        self.phases = {}
        for _ in range(self.case["grad_accum"]):
            with self.phase("forward"), self.autocast():
                loss = self.model(input_ids=self.tokens, labels=self.tokens).loss
            with self.phase("backward"):
                loss.backward()
            del loss
        with self.phase("step"):
            self.optimizer.step()
        with self.phase("zero"):
            self.optimizer.zero_grad(set_to_none=True)
        return self.phases


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
    row["state"] = sum(
        value.untyped_storage().nbytes()
        for state in step.optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.is_cuda
    )
    row["num_alloc_retries"] = torch.cuda.memory_stats()["num_alloc_retries"]
    return row


def read_events(starts_us: dict[str, int]) -> dict[str, list[Any]]:
    """Forward and backward as signed sizes in the order in which they happened, and what made each allocation."""
    sizes: dict[int, int] = {}
    result: dict[str, list[Any]] = {"forward": [], "backward": [], "labels": []}
    for entry in torch.cuda.memory._snapshot()["device_traces"][0]:
        phase = max((name for name in PHASES if entry["time_us"] >= starts_us[name]), key=PHASES.index, default=None)
        if entry["action"] == "alloc":
            sizes[entry["addr"]] = entry["size"]
            change = entry["size"]
        elif entry["action"] == "free_completed" and entry["addr"] in sizes:
            change = -sizes.pop(entry["addr"])
        else:
            continue
        if phase in ("forward", "backward"):
            result[phase].append(change)
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
    }


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
    options = parser.parse_args()
    cases = read_cases(options.set, options.only)
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
