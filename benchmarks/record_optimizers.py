"""Measure what optimizers keep and what their steps allocate on a CUDA GPU, and save the figures as JSON lines.

    python benchmarks/record_optimizers.py --out FILE [--only ID ...] [--skip ID ...] [--models NAME ...] [--workers 1]

Each case of `optimizer_cases.py` runs in a process of its own, for the models below and both dtypes: parameters of the
model's shapes on the GPU, random gradients, two steps that create the state and warm up the libraries, then a third
whose allocations are recorded. What the planner says an implementation cannot run on is left out.

Needs torch, the optimizers' packages and optplan; where optplan is not installed, `python .ci/link_types.py` links this
tree into `.types`, to be named in PYTHONPATH. With `--events`, what made each allocation is saved too.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import importlib.metadata
import json
import multiprocessing
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from optimizer_cases import CASES, Case, Pair
from record_steps import describe, environment

from optplan.planner.models.reader import read_model
from optplan.planner.optimizers.base import OptimizerContext
from optplan.planner.optimizers.registry import build_optimizer

CONFIGS: dict[str, dict[str, Any]] = {
    "llama-small": {
        "model_type": "llama", "vocab_size": 8000, "hidden_size": 1024, "intermediate_size": 2816,
        "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64,
        "max_position_embeddings": 2048, "tie_word_embeddings": False,
    },
    "llama-2-7b-layer": {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 1, "num_attention_heads": 32, "num_key_value_heads": 32,
        "max_position_embeddings": 4096, "tie_word_embeddings": False,
    },
    "gpt2-odd": {"model_type": "gpt2", "vocab_size": 8003, "n_embd": 960, "n_layer": 2, "n_head": 15},
}  # fmt: skip
DTYPES = ("bfloat16", "float32")
NUM_WARM_UP_STEPS = 2
SEED = 0

Job = tuple[int, str, str]
"""Number of the case, model, dtype."""


def build_pairs(model: str, dtype: str) -> list[Pair]:
    """The model's parameters, the planner's description beside each tensor on the GPU."""
    spec = read_model(CONFIGS[model], name=model, source="written for this benchmark", where=model)
    generator = torch.Generator("cuda").manual_seed(SEED)
    kind = getattr(torch, dtype)
    return [
        (p, torch.nn.Parameter(torch.randn(p.shape, generator=generator, device="cuda").mul_(0.02).to(kind)))
        for p in spec.unique_parameters
    ]


def take_step(optimizers: list[torch.optim.Optimizer]) -> None:
    """One step of all of them."""
    for optimizer in optimizers:
        optimizer.step()


def renew_gradients(pairs: list[Pair], *, seed: int) -> None:
    """Random gradients, all allocated before the step."""
    generator = torch.Generator("cuda").manual_seed(seed)
    for _, tensor in pairs:
        tensor.grad = None
    for _, tensor in pairs:
        tensor.grad = torch.randn(tensor.shape, generator=generator, device="cuda").to(tensor.dtype)
    torch.cuda.synchronize()
    gc.collect()


def tensors_within(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a state value with its dotted name: in lists, projector objects, quantized subclasses."""
    if isinstance(value, torch.Tensor):
        parts = getattr(value, "tensor_attrs", ())
        if not parts:
            yield name, value
        for part in parts:
            yield f"{name}.{part}", getattr(value, part)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from tensors_within(item, f"{name}.{number}")
    elif hasattr(value, "__dict__"):
        for key, item in vars(value).items():
            yield from tensors_within(item, f"{name}.{key}")


def state_bytes(optimizers: list[torch.optim.Optimizer]) -> dict[str, dict[str, int]]:
    """Bytes of the state's storages by device and name, each storage once."""
    found: defaultdict[str, Counter[str]] = defaultdict(Counter)
    seen: set[int] = set()
    for optimizer in optimizers:
        for state in optimizer.state.values():
            for key, value in state.items():
                for name, tensor in tensors_within(value, key):
                    storage = tensor.untyped_storage()
                    if tensor.numel() and storage.data_ptr() not in seen:
                        seen.add(storage.data_ptr())
                        device = "managed" if getattr(tensor, "is_paged", False) else tensor.device.type
                        found[device][name] += storage.nbytes()
    return {device: dict(sizes) for device, sizes in sorted(found.items())}


def read_trace(labels: list[str] | None) -> list[int]:
    """The recorded allocations as their bytes and the frees as minus theirs, in order; appends what made each."""
    events = []
    for entry in torch.cuda.memory._snapshot()["device_traces"][0]:
        if entry["action"] == "alloc":
            events.append(entry["size"])
            if labels is not None:
                labels.append(describe(entry["frames"]))
        elif entry["action"] == "free_completed":
            events.append(-entry["size"])
    return events


def record_step(optimizers: list[torch.optim.Optimizer], *, labels: list[str] | None) -> dict[str, Any]:
    """Peaks and allocations of one step, in bytes above what was there before it."""
    context = None if labels is None else "all"
    torch.cuda.memory._record_memory_history("all", context=context, stacks="all", max_entries=10**6)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()
    take_step(optimizers)
    torch.cuda.synchronize()
    after, events = torch.cuda.memory_stats(), read_trace(labels)
    torch.cuda.memory._record_memory_history(None)
    peaks = {
        f"peak_{kind}_bytes": after[f"{kind}_bytes.all.peak"] - before[f"{kind}_bytes.all.current"]
        for kind in ("requested", "allocated")
    }
    return {**peaks, "events": events}


def measure(case: Case, model: str, dtype: str, *, labels: list[str] | None) -> dict[str, Any]:
    """All figures of one case."""
    pairs = build_pairs(model, dtype)
    optimizers = case.build(pairs)
    for step in range(NUM_WARM_UP_STEPS):
        renew_gradients(pairs, seed=step + 1)
        take_step(optimizers)
    renew_gradients(pairs, seed=NUM_WARM_UP_STEPS + 1)
    step_figures = record_step(optimizers, labels=labels)
    state = state_bytes(optimizers)
    tensors = [tensor for _, parameter in pairs for tensor in (parameter, parameter.grad) if tensor is not None]
    known = sum(tensor.untyped_storage().nbytes() for tensor in tensors) + sum(state.get("cuda", {}).values())
    kept = torch.cuda.memory_stats()["requested_bytes.all.current"] - known
    return {"state": state, "kept_besides_bytes": kept, "step": step_figures}


def is_supported(case: Case, model: str, dtype: Any) -> bool:
    """Whether the planner says that the implementation runs on the model's parameters."""
    spec = read_model(CONFIGS[model], name=model, source="written for this benchmark", where=model)
    optimizer = build_optimizer(case.optimizer, case.options).bind(spec.unique_parameters)
    return optimizer.unsupported_reason(spec.unique_parameters, OptimizerContext(dtype, dtype)) is None


def attempt(arguments: tuple[Job, bool]) -> dict[str, Any]:
    """The case with its figures, or with the error that ended it."""
    (number, model, dtype), with_labels = arguments
    case = CASES[number]
    labels: list[str] | None = [] if with_labels else None
    row = {"optimizer": case.optimizer, "options": case.options, "model": model, "dtype": dtype}
    try:
        row |= {"package": f"{case.package} {importlib.metadata.version(case.package)}", "config": CONFIGS[model]}
        row |= measure(case, model, dtype, labels=labels)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:600]
    return row | ({} if labels is None else {"labels": labels})


def commit_here() -> str:
    """The commit of this tree, `unknown` outside a repository."""
    folder = Path(__file__).parent
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=folder)
    return found.stdout.strip() or "unknown"


def save_rows(jobs: list[Job], options: argparse.Namespace) -> int:
    """Measure every job and append its row as it comes; returns the number of failed cases."""
    where = environment() | {
        "triton": importlib.metadata.version("triton"),
        "command": " ".join(["python", "benchmarks/record_optimizers.py", *(Path(word).name for word in sys.argv[1:])]),
        "commit": options.commit or commit_here(),
    }
    num_errors, labelled = 0, []
    with multiprocessing.get_context("fork").Pool(options.workers, maxtasksperchild=1) as pool:
        for row in pool.imap_unordered(attempt, [(job, options.events is not None) for job in jobs]):
            labelled.append({**row})
            row.pop("labels", None)
            shown = row.get("error") or row["step"]["peak_requested_bytes"]
            print(row["optimizer"], row["options"], row["model"], row["dtype"], shown, flush=True)
            num_errors += "error" in row
            if "error" not in row:
                with options.out.open("a") as out:
                    out.write(json.dumps({**row, "environment": where}, separators=(",", ":")) + "\n")
    if options.events is not None:
        options.events.write_bytes(gzip.compress(json.dumps(labelled).encode()))
    return num_errors


def main() -> int:
    """Measure the cases of the command line and save them."""
    parser = argparse.ArgumentParser(description="Measure optimizers' state and the allocations of their steps.")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines file to append to")
    parser.add_argument("--only", nargs="+", metavar="ID", help="these optimizers alone")
    parser.add_argument("--skip", nargs="+", metavar="ID", default=[], help="all but these optimizers")
    parser.add_argument("--models", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="these models alone")
    parser.add_argument("--workers", type=int, default=1, help="cases measured at the same time")
    parser.add_argument("--commit", help="commit to record where the tree is no repository")
    parser.add_argument("--events", type=Path, help="gzipped JSON file for what made every allocation")
    options = parser.parse_args()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # every worker compiles its own
    jobs = [
        (number, model, dtype)
        for number, case in enumerate(CASES)
        for model in options.models
        for dtype in DTYPES
        if case.optimizer in (options.only or [case.optimizer]) and case.optimizer not in options.skip
        if is_supported(case, model, dtype)
    ]
    return 1 if save_rows(jobs, options) else 0


if __name__ == "__main__":
    sys.exit(main())
