"""Time steps that were measured once in more processes, as they differ from process to process; save JSON lines.

    python benchmarks/record_step_times.py --records tests/records/h200_profiles [--rounds 2] [--seconds N] [--out FILE]

Each round is a process on each GPU, and takes the steps of all records (or those named) that are shorter than
`--shorter-than`: those in which the host has a part. Models are built once a round and stepped by one optimizer after
the other, in another order in every round, so that what slows the host for a while meets other steps each time. A row
is one process's median of one step, whose settings are those of the record it names; it is added to the file beside the
records. `optplan validate` and `fit_step_time.py` take the median over the processes for the time of such a step.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import msgspec
import torch
from train_study_record import environment

from optplan.planner.candidates import Candidate
from optplan.planner.measured.expectation import asked_of
from optplan.planner.measured.measurement import Measurement
from optplan.planner.measured.record_files import load_record
from optplan.planner.measured.step_times import FILE_NAME, ProcessTime
from optplan.planner.request import StepRequest
from optplan.planner.workload import Workload
from optplan.profilers.live.host_speed import launching_seconds
from optplan.profilers.workloads.real_optimizers import build_optimizer
from optplan.profilers.workloads.real_step import Step, build_real_model, make_inputs, master_weights

NUM_WARM_UPS, NUM_STEPS = 4, 10


class Case(NamedTuple):
    """A recorded step: the name of its record, what it was asked for, and with which optimizer."""

    name: str
    request: StepRequest
    candidate: Candidate


def main() -> int:
    """Run the rounds; 1 if none got through."""
    options = parse_arguments()
    if options.round is not None:
        return run_round(options)
    begin, statuses = time.monotonic(), []
    for number in range(options.rounds):
        left = options.seconds - (time.monotonic() - begin)
        if number and left < (options.seconds - left) / number:
            print(f"no time for round {number + 1}", flush=True)
            break
        workers = [start_worker(gpu, number * options.gpus + gpu) for gpu in range(options.gpus)]
        statuses += [worker.wait() for worker in workers]
    return 0 if statuses and not any(statuses) else 1


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, required=True, help="folder of the records of single processes")
    parser.add_argument("--out", type=Path, help=f"appended to instead of {FILE_NAME} in the records' folder")
    parser.add_argument("--only", nargs="+", default=[], help="records whose names contain one of these")
    parser.add_argument("--shorter-than", type=float, default=0.3, help="seconds of the recorded step")
    parser.add_argument("--rounds", type=int, default=2, help="processes a GPU, one after the other")
    parser.add_argument("--gpus", type=int, default=max(1, torch.cuda.device_count()), help="GPUs that work at once")
    parser.add_argument("--seconds", type=float, default=600.0, help="no round is begun that would end later")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is for trying")
    parser.add_argument("--commit", default="", help="commit to record where the tree is no repository")
    parser.add_argument("--round", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out or options.records / FILE_NAME
    return options


def start_worker(gpu: int, number: int) -> subprocess.Popen[bytes]:
    """Run this command again for one round on one GPU."""
    words = [sys.executable, __file__, *sys.argv[1:], "--round", str(number)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    name = visible[gpu] if gpu < len(visible) and visible[gpu] else str(gpu)
    return subprocess.Popen(words, env=os.environ | {"CUDA_VISIBLE_DEVICES": name})


def run_round(options: argparse.Namespace) -> int:
    """All steps once, in the order of this round; a step that fails is said and left out."""
    device, num_failed, num_done = torch.device(options.device), 0, 0
    command = " ".join(["python", "benchmarks/record_step_times.py", *told()])
    where = {name: str(value) for name, value in (environment(options.commit) | {"command": command}).items()}
    for group in shuffled(read_cases(options), seed=options.round):
        model = None
        for case in group:
            try:
                if model is None:
                    model = build_real_model(case.request.model, case.request.config, device)
                row = {"record": case.name, **timed(case, model, device)}
            except Exception as error:
                num_failed += 1
                print(f"{case.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
                continue
            num_done += 1
            save(options.out, ProcessTime(**row, environment=where))
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"round {options.round}: {num_done} steps timed, {num_failed} failed", flush=True)
    return 0 if num_done else 1


def told() -> list[str]:
    """The words of the command line, without folders of this machine."""
    return [Path(word).name if "/" in word else word for word in sys.argv[1:]]


def read_cases(options: argparse.Namespace) -> list[Case]:
    """The recorded steps to be timed again."""
    cases = []
    for path in sorted(options.records.glob("*.json.gz")):
        name, record = path.name.removesuffix(".json.gz"), load_record(path)
        if options.only and not any(part in name for part in options.only):
            continue
        assert isinstance(record, Measurement)
        seconds = record.time.step_seconds if record.time else None
        if seconds is None or seconds >= options.shorter_than or record.config.gpus > 1:
            continue
        request, choices = asked_of(record)
        (candidate,), _ = Workload(request).candidates(choices)
        cases.append(Case(name, request, candidate))
    return cases


def shuffled(cases: Sequence[Case], *, seed: int) -> Iterator[list[Case]]:
    """The cases by model and manner of the step, both in an order of their own for each seed."""

    def manner(case: Case) -> str:
        return f"{case.request.model.name} {case.request.config}"

    groups = [list(group) for _, group in groupby(sorted(cases, key=manner), key=manner)]
    order = random.Random(seed)
    order.shuffle(groups)
    for group in groups:
        order.shuffle(group)
        yield group


def timed(case: Case, model: Any, device: torch.device) -> dict[str, Any]:
    """Median times of a step, and of its forward and backward, with how fast the host launched before and after."""
    config = case.request.config
    launches = [launching_seconds(device)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    masters = master_weights(trained, config)
    optimizer = build_optimizer(
        case.candidate.optimizer, model, masters or trained, case.request.model, state_dtype=case.request.state_dtype
    )
    step = Step(model, optimizer, trained, masters, make_inputs(model, config, device), config)
    clock = _Clock(optimizer, device)
    for _ in range(NUM_WARM_UPS + NUM_STEPS):
        clock.begin()
        step.take()
    whole, rest = clock.read()
    launches.append(launching_seconds(device))
    seconds, until_step = median(whole[NUM_WARM_UPS:]), median(rest[NUM_WARM_UPS:])
    return {
        "step_seconds": seconds, "phases": {"step": seconds - until_step}, "num_steps": NUM_STEPS,
        "host_launch_seconds": tuple(launches),
    }  # fmt: skip


class _Clock:
    """Notes on the GPU when a step begins, when its optimizer begins, and when that has ended."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._moments: list[list[Any]] = []
        optimizer.register_step_pre_hook(lambda *_: self._note())
        optimizer.register_step_post_hook(lambda *_: self._note())

    def begin(self) -> None:
        """A step begins."""
        self._moments.append([])
        self._note()

    def read(self) -> tuple[list[float], list[float]]:
        """Seconds of each step to the end of its optimizer's, and to the beginning of that."""
        if self._on_gpu:
            torch.cuda.synchronize()
        whole = [self._between(moments[0], moments[-1]) for moments in self._moments]
        return whole, [self._between(moments[0], moments[1]) for moments in self._moments]

    def _note(self) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._moments[-1].append(event)
        else:
            self._moments[-1].append(time.perf_counter())

    def _between(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1000 if self._on_gpu else float(end - begin)


def save(path: Path, time_of: ProcessTime) -> None:
    """Append a line; those of several processes do not mix."""
    with path.open("ab") as file:
        file.write(msgspec.json.encode(time_of) + b"\n")


if __name__ == "__main__":
    raise SystemExit(main())
