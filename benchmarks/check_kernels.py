"""Run the optimizers' kernels under NVIDIA's compute-sanitizer and Nsight Compute, and save what they found.

    python benchmarks/check_kernels.py sanitize --out FILE [--optimizers ID ...] [--tools NAME ...]
    python benchmarks/check_kernels.py profile --out FILE [--optimizers ID ...]

`sanitize` takes two steps of each optimizer over small tensors of odd shapes in each dtype under memcheck and under
racecheck; a row of JSON for each tool with the number of errors; the exit code is 1 if there was one. `profile` takes a
step over a tensor of the size of Llama-2-7B's feed-forward matrices and reads each kernel's time, bytes and share of
the DRAM's throughput, issue slots, registers and occupancy; a row for each launch. Both need a CUDA GPU and tools that
its driver admits. Where optplan is not installed, `python .ci/link_types.py` links this tree into `.types`, to be named
in PYTHONPATH.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHECKS = ("memcheck", "racecheck")
DTYPES = ("bfloat16", "float32")
OPTIMIZERS = ("adamw", "adam-mini", "micro-adam", "micro-adam-dense", "adapprox", "adapprox-no-momentum")
SMALL_SHAPES: tuple[tuple[int, ...], ...] = ((1,), (63,), (4097,), (37, 101), (129, 200), (), (24, 96), (70001,))
LARGE_SHAPE = (4096, 11008)
METRICS = {
    "gpu__time_duration.sum": "seconds",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_throughput_percent",
    "dram__bytes.sum": "dram_bytes",
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "issue_slots_busy_percent",
    "launch__registers_per_thread": "registers",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
}
UNITS = {"nsecond": 1e-9, "usecond": 1e-6, "msecond": 1e-3, "second": 1.0, "ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0,
         "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}  # fmt: skip


def main() -> int:
    """Check or profile what is asked for; 1 if an error was found."""
    options = parse_arguments()
    if options.command == "step":
        for name in options.optimizers:
            for dtype in DTYPES[:1] if options.large else DTYPES:
                step(name, dtype, large=options.large)
        return 0
    if options.command == "profile":
        rows = profile(options.optimizers)
    else:
        rows = [sanitize(options.optimizers, tool) for tool in options.tools]
    where = environment(options.commit)
    with options.out.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**row, "environment": where}) + "\n")
            print(json.dumps(row))
    return int(any(row.get("num_errors", 0) for row in rows))


def parse_arguments() -> argparse.Namespace:
    """The command line; `step` is what runs under the tools."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["sanitize", "profile", "step"])
    parser.add_argument("--out", type=Path, help="JSON lines are appended to this file")
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS)
    parser.add_argument("--tools", nargs="+", default=list(CHECKS), choices=CHECKS, help="of `sanitize`")
    parser.add_argument("--large", action="store_true", help="of `step`: the tensors that are profiled")
    parser.add_argument("--commit", default="", help="commit to record; by default that of the tree")
    return parser.parse_args()


def step(name: str, dtype_name: str, *, large: bool) -> None:
    """Two steps of one optimizer; over large tensors ten, the last of which the profiler sees behind a marker."""
    import torch
    from bench_contenders import CONTENDERS

    dtype = getattr(torch, dtype_name)
    described = large_tensors(name) if large else small_tensors(name)
    generator = torch.Generator("cuda").manual_seed(0)
    pairs = [
        (p, torch.nn.Parameter(torch.randn(p.shape, generator=generator, device="cuda").to(dtype))) for p in described
    ]
    optimizer = CONTENDERS[name].build(pairs, "triton", 1e-3)
    num_steps = 10 if large else 2  # Adapprox iterates twice in its first eight
    for number in range(num_steps):
        for _, tensor in pairs:
            tensor.grad = torch.randn(tensor.shape, generator=generator, device="cuda").to(dtype)
        if large and number == num_steps - 1:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            torch.cuda._sleep(1)  # its kernel stands before those of the step in the profile
        optimizer.step()
        torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    assert all(bool(tensor.isfinite().all()) for _, tensor in pairs)


def small_tensors(name: str) -> list[Any]:
    """Descriptions of tensors of odd shapes; for Adam-mini one of every kind of block and memory order."""
    from optplan.planner.tensors import HeadLayout, Parameter

    described = [
        Parameter(f"p{i}", shape, "mlp" if len(shape) == 2 else "other", "linear")
        for i, shape in enumerate(SMALL_SHAPES)
    ]
    if name == "adam-mini":
        fused = HeadLayout(5, num_query_heads=4, num_key_heads=2, num_value_heads=2)
        described += [
            Parameter("bias", (1025,), "bias", "linear"),
            Parameter("query", (30, 1700), "query", "linear", heads=HeadLayout(15, num_query_heads=2)),
            Parameter("fused", (40, 16), "fused_qkv", "linear", heads=fused),
            Parameter("columns", (129, 40), "fused_qkv", "conv1d", (1,), fused),
            Parameter("rows", (3, 20_001), "mlp", "linear"),
        ]
    return described


def large_tensors(name: str) -> list[Any]:
    """A feed-forward matrix of Llama-2-7B; for Adam-mini also its queries, whose blocks are heads, and columns."""
    from optplan.planner.tensors import HeadLayout, Parameter

    described = [Parameter("mlp", LARGE_SHAPE, "mlp", "linear")]
    if name == "adam-mini":
        described += [
            Parameter("query", (4096, 4096), "query", "linear", heads=HeadLayout(128, num_query_heads=32)),
            Parameter("columns", (4096, 16384), "mlp", "conv1d", (1,)),
        ]
    return described


def sanitize(names: Sequence[str], tool: str) -> dict[str, Any]:
    """What one tool of compute-sanitizer says of two steps of each optimizer in each dtype."""
    command = [_find("compute-sanitizer"), "--tool", tool, "--print-limit", "10", *_steps(names)]
    # Each tensor in an allocation of its own, so that an access beside it is one outside of memory.
    apart = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=apart)
    text = result.stdout + result.stderr
    num_errors = count_errors(text)
    if num_errors is None or (result.returncode and not num_errors):
        raise SystemExit(f"{tool} did not finish:\n{text[-3000:]}")
    if num_errors:
        print(text[:6000], file=sys.stderr)
    return {
        "schema": "optplan.kernel-check/1", "optimizers": list(names), "dtypes": list(DTYPES), "tool": tool,
        "tool_version": _version("compute-sanitizer"), "num_steps": 2,
        "shapes": {name: [list(p.shape) for p in small_tensors(name)] for name in names},
        "num_errors": num_errors,
    }  # fmt: skip


def profile(names: Sequence[str]) -> list[dict[str, Any]]:
    """What Nsight Compute reads of each kernel of a step, one row a launch."""
    command = [
        _find("ncu"), "--profile-from-start", "off", "--clock-control", "none", "--csv", "--page", "raw",
        "--metrics", ",".join(METRICS), *_steps(names, large=True),
    ]  # fmt: skip
    from bench_optimizers import copy_bandwidth

    bandwidth = round(copy_bandwidth())
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    launches = read_launches(result.stdout)
    if result.returncode or not launches:
        raise SystemExit(f"ncu did not finish:\n{(result.stdout + result.stderr)[-3000:]}")
    rows, version, number = [], _version("ncu"), -1
    for launch in launches:
        if "spin" in launch["kernel"]:
            number += 1
            continue
        rows.append({
            "schema": "optplan.kernel-profile/1", "optimizer": names[number], "dtype": DTYPES[0],
            "shapes": [list(p.shape) for p in large_tensors(names[number])], "tool_version": version,
            "copy_bytes_per_s": bandwidth, **launch,
        })  # fmt: skip
    return rows


def read_launches(text: str) -> list[dict[str, Any]]:
    """The launches in what `ncu --csv --page raw` prints: lines of its own, names, units, then a line a launch."""
    lines = text.splitlines()
    start = next((place for place, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    units, *launches = [*csv.DictReader(io.StringIO("\n".join(lines[start:])))] or [{}]
    return [
        {
            "kernel": launch["Kernel Name"],
            "grid": launch["Grid Size"],
            "block": launch["Block Size"],
            **{METRICS[metric]: _number(launch[metric], units[metric]) for metric in METRICS},
        }
        for launch in launches
    ]


def count_errors(text: str) -> int | None:
    """The errors, or hazards, that compute-sanitizer sums up at its end; None if it did not get there."""
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    return int(found[-1]) if found else None


def environment(commit: str) -> dict[str, str]:
    """Where and with what it was measured."""
    from bench_optimizers import environment as of_benchmark

    words = [Path(word).name for word in sys.argv[1:]]
    return {**of_benchmark(commit), "command": " ".join(["python", "benchmarks/check_kernels.py", *words])}


def _steps(names: Sequence[str], *, large: bool = False) -> list[str]:
    return [sys.executable, __file__, "step", "--optimizers", *names, *(["--large"] if large else [])]


def _find(tool: str) -> str:
    folders: Sequence[str] = ("/usr/local/cuda/bin",)
    found = shutil.which(tool) or next((str(Path(f, tool)) for f in folders if Path(f, tool).exists()), None)
    if found is None:
        raise SystemExit(f"{tool} is not on the PATH")
    return found


def _version(tool: str) -> str:
    text = subprocess.run([_find(tool), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"[Vv]ersion ([\d.]+)", text)
    return found.group(1) if found else text.strip()


def _number(text: str, unit: str) -> float:
    return float(text.replace(",", "")) * UNITS.get(unit, 1.0)


if __name__ == "__main__":
    raise SystemExit(main())
