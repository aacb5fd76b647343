"""Time the optimizers of this package against torch's fused AdamW on a CUDA GPU, and save the figures as JSON lines.

    python benchmarks/bench_optimizers.py --out FILE [--optimizers ID ...] [--models NAME ...] [--dtypes NAME ...]

For each model and dtype: parameters and random gradients of the model's shapes on the GPU, then steps of torch's
`AdamW(fused=True)` and of the optimizer in turns, timed with CUDA events; the host's time is that of `step()` until it
returns. Slow steps take fewer turns: `--seconds` says when none begins any more. Each optimizer is checked against its
own reference on odd shapes first: nothing of a wrong one is reported, and the exit code is 1. Where optplan is not
installed, `python .ci/link_types.py` links this tree into `.types`, to be named in PYTHONPATH.

A new optimizer is a row of `CONTENDERS`.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from bench_contenders import CONTENDERS, Contender, Pair

from optplan.planner.catalog import load_model
from optplan.planner.optimizers.base import OptimizerContext
from optplan.planner.optimizers.registry import build_optimizer
from optplan.planner.tensors import Parameter

ODD_SHAPES: tuple[tuple[int, ...], ...] = (
    (1,),
    (63,),
    (255,),
    (4097,),
    (37, 101),
    (129, 1000),
    (),
    (70001,),
    (8, 65536),
)
MAX_BYTES = 115 * 10**9
"""What parameters, gradients and the state of both optimizers may take; layers are left out of larger models."""
NUM_WARM_UP_STEPS = 10
"""Adapprox iterates twice in the first eight."""
MIN_ROUNDS = 3
SEED = 0


class Limits(NamedTuple):
    """How many rounds at most, and the seconds after which none begins but the first `MIN_ROUNDS`."""

    rounds: int
    seconds: float


def main() -> int:
    """Measure what is asked for; 1 if a check failed."""
    options = parse_arguments()
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s", file=sys.stderr)
    num_red = 0
    for name in options.optimizers:
        for dtype_name in options.dtypes:
            error = check(CONTENDERS[name], getattr(torch, dtype_name))
            if error:
                num_red += 1
                print(f"RED {name} {dtype_name}: {error}", file=sys.stderr)
                continue
            for model in options.models:
                limits = Limits(options.rounds, options.seconds)
                row = measure(name, model, dtype_name, limits=limits, bandwidth=bandwidth)
                save(options, row)
    return min(num_red, 1)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are appended to this file")
    parser.add_argument("--optimizers", nargs="+", default=["adamw"], choices=sorted(CONTENDERS))
    parser.add_argument("--models", nargs="+", default=["llama-2-7b", "gpt2"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=15, help="steps of each optimizer that are timed")
    parser.add_argument("--seconds", type=float, default=20.0, help="after which no more rounds begin, but three do")
    parser.add_argument("--commit", default="", help="commit to record; by default that of the tree")
    return parser.parse_args()


def check(contender: Contender, dtype: torch.dtype) -> str:
    """What is wrong with the kernels on odd shapes, compared with the reference; empty if nothing."""
    start = odd_pairs(dtype)
    moved: list[list[torch.Tensor]] = []
    for backend in ("triton", "torch"):
        pairs = [(p, torch.nn.Parameter(t.detach().clone())) for p, t in start]
        optimizer = contender.build(pairs, backend, 1e-2)
        for step in range(3):
            renew_gradients(pairs, seed=step)
            optimizer.step()
        moved.append(
            [(t.detach().double() - old.detach().double()) for (_, t), (_, old) in zip(pairs, start, strict=True)]
        )
    ours, reference = (torch.cat([change.flatten() for change in changes]) for changes in moved)
    error = float((ours - reference).norm() / reference.norm())
    limit = contender.check_limits[dtype]
    return (
        "" if error <= limit else f"the kernels differ from the reference by {error:.3g} of the update, limit {limit}"
    )


def odd_pairs(dtype: torch.dtype) -> list[Pair]:
    """Parameters of shapes that divide nothing."""
    described = [
        Parameter(f"p{i}", shape, "mlp" if len(shape) == 2 else "other", "linear") for i, shape in enumerate(ODD_SHAPES)
    ]
    return random_pairs(described, dtype)


def random_pairs(described: Sequence[Parameter], dtype: torch.dtype) -> list[Pair]:
    """Each description with random values of its shape on the GPU."""
    generator = torch.Generator("cuda").manual_seed(SEED)
    values = [torch.randn(p.shape, generator=generator, device="cuda", dtype=dtype).mul_(0.02) for p in described]
    return [(p, torch.nn.Parameter(value)) for p, value in zip(described, values, strict=True)]


def renew_gradients(pairs: Sequence[Pair], *, seed: int) -> None:
    """Random gradients."""
    generator = torch.Generator("cuda").manual_seed(seed)
    for _, tensor in pairs:
        tensor.grad = torch.randn(tensor.shape, generator=generator, device="cuda", dtype=tensor.dtype)


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large copy on the GPU."""
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    seconds = [run_timed(lambda: target.copy_(source))[0] for _ in range(12)]
    return 2 * source.numel() / statistics.median(seconds[2:])


def run_timed(step: Callable[[], Any]) -> tuple[float, float]:
    """Seconds that `step` took on the GPU, and on the host until it returned."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    before = time.perf_counter()
    step()
    host = time.perf_counter() - before
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3, host


def take_turns(
    first: Callable[[], Any], second: Callable[[], Any], *, limits: Limits
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """The times of two steps that take turns, after a warm-up; as many rounds as the limits allow."""
    begin = time.perf_counter()
    for _ in range(NUM_WARM_UP_STEPS):
        run_timed(first)
        run_timed(second)
        if time.perf_counter() - begin > limits.seconds / 4:
            break
    times: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    while len(times[0]) < limits.rounds:
        if len(times[0]) >= MIN_ROUNDS and time.perf_counter() - begin > limits.seconds:
            break
        times[0].append(run_timed(first))
        times[1].append(run_timed(second))
    return times


def measure(name: str, model: str, dtype_name: str, *, limits: Limits, bandwidth: float) -> dict[str, Any]:
    """The figures of one optimizer on one model beside torch's."""
    dtype = getattr(torch, dtype_name)
    described, left_out = tensors_of(name, model, dtype_name)
    pairs = random_pairs(described, dtype)
    renew_gradients(pairs, seed=1)
    tensors = [tensor for _, tensor in pairs]
    baseline = torch.optim.AdamW(tensors, lr=1e-5, weight_decay=0.01, fused=True)
    optimizer = CONTENDERS[name].build(pairs, "triton", 1e-5)
    times = dict(zip(("torch", "ours"), take_turns(baseline.step, optimizer.step, limits=limits), strict=True))
    num_bytes = moved_bytes(name, described, dtype_name)
    row = {
        "schema": "optplan.optimizer-benchmark/1", "optimizer": name, "options": CONTENDERS[name].options,
        "model": model, "left_out_layers": left_out, "dtype": dtype_name, "num_tensors": len(tensors),
        "num_parameters": sum(p.numel for p in described), "rounds": len(times["ours"]),
        "copy_bytes_per_s": round(bandwidth), "moved_bytes": num_bytes,
        **{who: summarize(pairs_of_times) for who, pairs_of_times in times.items()},
    }  # fmt: skip
    median = row["ours"]["step_seconds"]["p50"]
    row["ratio_to_torch"] = round(median / row["torch"]["step_seconds"]["p50"], 4)
    row["roofline_fraction"] = round(num_bytes / median / bandwidth, 4)
    del pairs, tensors, baseline, optimizer
    gc.collect()
    torch.cuda.empty_cache()
    return row


def tensors_of(name: str, model: str, dtype_name: str) -> tuple[list[Parameter], int]:
    """The model's tensors, and how many of its last layers had to be left out to fit the GPU."""
    spec = load_model(model)
    all_tensors = list(spec.unique_parameters)
    context = OptimizerContext(dtype_name, dtype_name)  # type: ignore[arg-type]
    planner = build_optimizer(CONTENDERS[name].optimizer_id or name, CONTENDERS[name].options).bind(all_tensors)
    width = torch.finfo(getattr(torch, dtype_name)).bits // 8
    size = {p.name: 4 * width * p.numel + sum(s.num_bytes for s in planner.state(p, context)) for p in all_tensors}
    layers = sorted({number for p in all_tensors if (number := layer_of(p.name)) is not None})
    for kept in range(len(layers), 0, -1):
        chosen = [p for p in all_tensors if (layer_of(p.name) or 0) < kept]
        if sum(size[p.name] for p in chosen) <= MAX_BYTES:
            return chosen, len(layers) - kept
    raise SystemExit(f"{model} does not fit with a single layer")


def layer_of(name: str) -> int | None:
    """The number of the layer in a dotted parameter name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def moved_bytes(name: str, described: Sequence[Parameter], dtype_name: str) -> int:
    """The planner's floor for a step."""
    context = OptimizerContext(dtype_name, dtype_name)  # type: ignore[arg-type]
    planner = build_optimizer(CONTENDERS[name].optimizer_id or name, CONTENDERS[name].options).bind(described)
    return sum(planner.moved_bytes(p, context) for p in described)


def summarize(times: list[tuple[float, float]]) -> dict[str, dict[str, float]]:
    """p20, p50 and p80 of the GPU's and the host's seconds."""
    names = ("step_seconds", "host_seconds")
    return {name: percentiles(list(values)) for name, values in zip(names, zip(*times, strict=True), strict=True)}


def percentiles(values: list[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    fifths = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": round(fifths[1], 9), "p50": round(fifths[4], 9), "p80": round(fifths[7], 9)}


def save(options: argparse.Namespace, row: dict[str, Any]) -> None:
    """Append a row with its environment, and print its main figures."""
    row["environment"] = environment(options.commit)
    with options.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    ours, torchs = row["ours"], row["torch"]
    print(
        f"{row['optimizer']:12} {row['model']:14} {row['dtype']:9} ours {ours['step_seconds']['p50'] * 1e3:8.3f} ms"
        f"  torch {torchs['step_seconds']['p50'] * 1e3:8.3f} ms  ratio {row['ratio_to_torch']:.3f}"
        f"  roofline {row['roofline_fraction']:.3f}  host {ours['host_seconds']['p50'] * 1e3:.3f} ms"
        f" (torch {torchs['host_seconds']['p50'] * 1e3:.3f})",
        flush=True,
    )


def environment(commit: str) -> dict[str, str]:
    """Where and with what the figures were measured."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    words = [Path(word).name for word in sys.argv[1:]]
    return {
        "gpu": torch.cuda.get_device_name(), "driver": driver, "torch": torch.__version__, "triton": triton.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["python", "benchmarks/bench_optimizers.py", *words]),
        "commit": commit or head.stdout.strip() or "unknown",
        **({"note": os.environ["OPTPLAN_RECORD_NOTE"]} if os.environ.get("OPTPLAN_RECORD_NOTE") else {}),
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
